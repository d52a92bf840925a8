"""Descriptions of sweeps: lists of settings to runs, and runs to JSON and back."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gipo_jax import objectives, protocols, train, user_files
from gipo_jax.config import Config, ConfigError, HParams
from gipo_jax.domains.tokens import selection
from gipo_jax.settings import product
from gipo_jax.user_files import Reference

CONFIG_FIELDS = tuple(field.name for field in dataclasses.fields(Config))
HPARAM_FIELDS = tuple(f.name for f in dataclasses.fields(HParams) if f.name != "objective_params")
_CONFIG_DEFAULTS = Config()


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a sweep."""

    name: str  # what tells it from the others, for people
    config: Config  # static settings; max_buffer_size is left to the sweep when None
    hparams: HParams  # traced settings, Python numbers, as made by train.make_hparams


def expand(
    *,
    seeds: int = 1,
    seed_offset: int = 0,
    objective_args: Mapping[str, Any] | None = None,
    protocol: str | None = None,
    **settings: Any,
) -> list[Run]:
    """All combinations of settings, each once.

    Args:
        seeds: number of seeds, >= 1: ``seed_offset .. seed_offset + seeds - 1``.
        seed_offset: first seed, >= 0.
        objective_args: parameters of objectives; each goes to the objectives that have it.
        protocol: settings of a published experiment, see ``protocols``; ``settings`` win over them.
        settings: fields of ``Config`` and ``HParams``, and parameters of objectives where no field
            has that name. A list is swept, anything else is one value (``hidden_sizes``: a tuple);
            ``env_params`` is a dict of such.

    Returns:
        runs; seeds vary fastest, then parameters of objectives, then traced settings.

    Raises:
        ConfigError: a setting is unknown, not valid, or fits no objective of the sweep.
    """
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise ConfigError("seeds", seeds, "an integer >= 1")
    top = 2**31 - seeds
    whole = isinstance(seed_offset, int) and not isinstance(seed_offset, bool)
    if not whole or not 0 <= seed_offset <= top:
        raise ConfigError("seed_offset", seed_offset, f"an integer in [0, {top}]")
    if "seed" in settings:
        raise ConfigError("seed", settings["seed"], "left out: give seeds and seed_offset")
    if protocol is not None:
        settings = protocols.settings(protocol) | settings
    static = {k: _values(k, v) for k, v in settings.items() if k in CONFIG_FIELDS}
    traced = {k: _values(k, v) for k, v in settings.items() if k in HPARAM_FIELDS}
    own = {k: v for k, v in settings.items() if k not in static and k not in traced}
    if not isinstance(objective_args or {}, Mapping):
        raise ConfigError("objective_args", objective_args, "values by name")
    for name, value in (objective_args or {}).items():
        if name in settings:
            raise ConfigError(name, value, f"one of this and {settings[name]!r}: it is given twice")
        own[name] = value
    specs = [objectives.spec(o) for o in static.get("objective", [_CONFIG_DEFAULTS.objective])]
    known = {name for spec in specs for name in spec.params}
    if protocol is not None:
        own = protocols.objective_params(protocol, known) | own
    own = {k: _values(k, v) for k, v in own.items()}
    _check_used(own, [spec.name for spec in specs], known)

    runs: dict[Any, Run] = {}
    chosen = static.get("selection", [])
    kernels = any(spec.takes_kernel for spec in specs)
    for fixed in product(static):
        spec = objectives.spec(fixed.get("objective", _CONFIG_DEFAULTS.objective))
        if kernels and not spec.takes_kernel:
            fixed.pop("kernel", None)
        config = _config(selection.own_settings(fixed, chosen) if chosen else fixed)
        takes = {name: values for name, values in own.items() if name in spec.params}
        for numbers in product(traced):
            for parameters in product(takes):
                for seed in range(seed_offset, seed_offset + seeds):
                    hparams = train.make_hparams(
                        config, seed=seed, objective_params=parameters, **numbers
                    )
                    named = _flat(numbers) | parameters | {"seed": seed}
                    values = [f"{key}={value}" for key, value in named.items()]
                    run = Run(" ".join([program_name(config), *values]), config, hparams)
                    runs.setdefault(_identity(run), run)
    return list(runs.values())


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with each parameter of the environment on its own, as ``env_params.NAME``."""
    own = settings.get("env_params") or {}
    rest = {key: value for key, value in settings.items() if key != "env_params"}
    return rest | {f"env_params.{key}": value for key, value in own.items()}


def env_name(env: Any) -> str:
    """Name of an environment given by name, or as an object or what makes one."""
    if isinstance(env, str):
        return env
    made = isinstance(env, type) or not hasattr(env, "name")
    return str(getattr(env, "__name__", type(env).__name__) if made else env.name)


# How settings that may be objects are called, in tables and for people
_CALLED: dict[str, Callable[[Any], str]] = {
    "env": env_name,
    "objective": lambda objective: objectives.spec(objective).name,
    "selection": selection.name_of,
}


def program_name(config: Config) -> str:
    """What tells a static configuration from the others of a sweep, for people."""
    parts = [env_name(config.env), _CALLED["objective"](config.objective)]
    for field in ("kernel", "ratio_level", "selection"):
        value = getattr(config, field)
        if value != getattr(_CONFIG_DEFAULTS, field):
            parts.append(_CALLED.get(field, str)(value))
    return " ".join(parts)


def encode(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Runs as JSON: one entry for each static configuration, with the settings of its runs."""
    groups: dict[Config, dict[str, Any]] = {}
    objects: dict[tuple[str, str], Any] = {}
    for index, run in enumerate(runs):
        if run.config not in groups:
            _check_names(run.config, objects)
            config = {name: _to_json(name, getattr(run.config, name)) for name in CONFIG_FIELDS}
            groups[run.config] = {"config": config, "runs": []}
        hparams = {n: _plain(v) for n, v in dataclasses.asdict(run.hparams).items()}
        groups[run.config]["runs"].append({"run": index, "name": run.name} | hparams)
    return list(groups.values())


def decode(
    groups: Iterable[Mapping[str, Any]], env: Any = None, objective: Any = None
) -> list[Run]:
    """Runs from ``encode``'s JSON, with the objects of runs that were made with some."""
    given = {"env": env, "objective": objective}
    groups = list(groups)
    for field, value in given.items():
        stored = [group["config"][field] for group in groups]
        if value is not None and not any(isinstance(one, dict) for one in stored):
            valid = f"left out: this sweep has {', '.join(dict.fromkeys(stored))} by name"
            raise ConfigError(field, _CALLED[field](value), valid)
    runs: dict[int, Run] = {}
    for group in groups:
        config = Config(**{k: _from_json(k, v, given.get(k)) for k, v in group["config"].items()})
        for entry in group["runs"]:
            hparams = {k: _numbers(v) for k, v in entry.items() if k not in ("run", "name")}
            runs[entry["run"]] = Run(entry["name"], config, HParams(**hparams))
    return [runs[index] for index in sorted(runs)]


def _check_names(config: Config, objects: dict[tuple[str, str], Any]) -> None:
    """Refuses another object of a name that ``objects`` of the sweep has already."""
    for field, called in _CALLED.items():
        value = getattr(config, field)
        name = called(value)
        if not name.strip() or not name.isprintable():
            raise ConfigError(field, name, "an object whose name tables can show")
        if field == "objective" and objectives.KNOWN.get(name) is value:
            value = name
        if len({value, objects.setdefault((field, name), value)}) > 1:
            valid = "objects that tables can tell apart by name; two of this sweep are called so"
            raise ConfigError(field, name, valid)


def _to_json(field: str, value: Any) -> Any:
    """A static setting as JSON: what is the user's own as a ``Reference``."""
    if isinstance(value, str):
        own = user_files.is_reference(value)
        return Reference.of(value, "reference", value).to_json() if own else value
    if field not in _CALLED:
        return value
    name = _CALLED[field](value)
    if field == "objective" and objectives.KNOWN.get(name) is value:
        return name
    kind = "function" if field == "objective" else "object"
    return Reference.of(value, kind, name).to_json()


def _from_json(field: str, stored: Any, given: Any) -> Any:
    """The static setting that ``_to_json`` wrote."""
    if not isinstance(stored, dict):
        # JSON has no tuples.
        return tuple(stored) if isinstance(stored, list) else stored
    called = None if given is None else _CALLED[field](given)
    reference = Reference.from_json(stored)
    found = reference.find(field, given, called)
    own_file = field == "objective" and isinstance(found, str)
    return reference.check_values(field, load_objective(found)) if own_file else found


def _plain(value: Any) -> Any:
    """A traced setting as JSON, which has no infinity."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    value = value.item() if hasattr(value, "item") else value
    return str(value) if value in (math.inf, -math.inf) else value


def _numbers(stored: Any) -> Any:
    """The traced setting that ``_plain`` wrote."""
    if isinstance(stored, dict):
        return {key: _numbers(item) for key, item in stored.items()}
    return float(stored) if isinstance(stored, str) else stored


def difference(stored: Sequence[Any], given: Sequence[Any]) -> tuple[str, Any, Any] | None:
    """The first setting in which two results of ``encode`` differ: its name and both values.

    Where there are more runs in one of them, the values are all that the setting takes.
    """
    before, now = _by_run(stored), _by_run(given)
    names = dict.fromkeys(name for run in before + now for name in run)
    if len(before) == len(now):
        for old, new in zip(before, now, strict=True):
            for name in names:
                values = old.get(name), new.get(name)
                if not same_setting(*values):
                    return name, values[0], values[1]
        return None
    for name in names:
        taken: list[list[Any]] = [[], []]
        for runs, values_taken in zip((before, now), taken, strict=True):
            for run in runs:
                if not any(same_setting(run.get(name), value) for value in values_taken):
                    values_taken.append(run.get(name))
        known = [any(same_setting(value, other) for other in taken[1]) for value in taken[0]]
        if not all(known) or len(taken[0]) != len(taken[1]):
            return name, taken[0], taken[1]
    return "number of runs", len(before), len(now)


def settings_of_runs(groups: Sequence[Any]) -> list[dict[str, Any]]:
    """All settings of each run in a result of ``encode`` by name; objects by what they are called.

    The order is that of the fields.
    """
    return [
        {name: _called(name, value) for name, value in run.items() if name != "max_buffer_size"}
        for run in _by_run(groups)
    ]


def named_objects(groups: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Any]:
    """What stands for each environment, objective and selection in a result of ``encode``, by its
    field and what it is called.
    """
    stored = [(field, group["config"][field]) for group in groups for field in _CALLED]
    return {(field, _called(field, value)): value for field, value in stored}


def same_setting(one: Any, other: Any) -> bool:
    """Whether two settings in results of ``encode`` are the same; code may lie elsewhere."""
    if isinstance(one, dict) and isinstance(other, dict):
        return Reference.from_json(one).same(Reference.from_json(other))
    return bool(one == other)


def _called(field: str, value: Any) -> Any:
    if isinstance(value, dict):
        value = Reference.from_json(value).name
    if field == "objective":
        return objectives.RENAMED.get(value, value)
    if field == "selection":
        return selection.RENAMED.get(value, value)
    # JSON has no tuples.
    return tuple(value) if isinstance(value, list) else value


def _by_run(groups: Sequence[Any]) -> list[dict[str, Any]]:
    """Settings of each run in a result of ``encode``, as they stand there."""
    runs = {}
    for group in groups:
        for entry in group["runs"]:
            settings = group["config"] | _flat(entry) | entry["objective_params"]
            dropped = ("run", "name", "objective_params")
            runs[entry["run"]] = {k: v for k, v in settings.items() if k not in dropped}
    return [runs[index] for index in sorted(runs)]


def load_objective(reference: str) -> Callable[..., Any]:
    """The function that ``path/to/file.py:function`` names."""
    function = user_files.load("objective", reference, "FUNCTION")
    if not callable(function):
        name = reference.rpartition(":")[2]
        raise ConfigError("objective", reference, f"FILE.py:FUNCTION, but {name} is no function")
    return function


def _values(name: str, value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(product({key: _values(f"{name}: {key}", v) for key, v in value.items()}))
    values = list(value) if isinstance(value, list | range | np.ndarray) else [value]
    if not values:
        raise ConfigError(name, value, "at least one value")
    return [v.item() if isinstance(v, np.generic) else v for v in values]


def _check_used(own: Mapping[str, Any], names: Sequence[str], parameters: set[str]) -> None:
    """Every parameter must belong to some objective of the sweep, so that no typo goes unseen."""
    for name, values in own.items():
        if name not in parameters:
            everywhere = {p for o in objectives.KNOWN for p in objectives.spec(o).params}
            known = sorted({*CONFIG_FIELDS, *HPARAM_FIELDS, *parameters})
            near = difflib.get_close_matches(name, known, n=1)
            if name in everywhere or not near:
                valid = f"a parameter of an objective in the sweep ({', '.join(names)}):"
                valid += f" {', '.join(sorted(parameters)) or 'they have none'}"
            else:
                valid = f"a known setting, such as {near[0]}"
            raise ConfigError(name, values[0] if len(values) == 1 else values, valid)


def _config(fixed: Mapping[str, Any]) -> Config:
    config = Config(**fixed)
    train.make(config)
    return config


def _identity(run: Run) -> Any:
    numbers = _flat(dataclasses.asdict(run.hparams))
    parameters = numbers.pop("objective_params")
    return run.config, tuple(numbers.items()), tuple(sorted(parameters.items()))
