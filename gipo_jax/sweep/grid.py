"""Descriptions of sweeps: lists of settings to runs, and runs to JSON and back."""

import dataclasses
import difflib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gipo_jax import objectives, protocols, train, user_files
from gipo_jax.config import Config, ConfigError, HParams
from gipo_jax.domains.tokens import selection

CONFIG_FIELDS = tuple(field.name for field in dataclasses.fields(Config))
HPARAM_FIELDS = tuple(f.name for f in dataclasses.fields(HParams) if f.name != "objective_params")
_CONFIG_DEFAULTS = Config()


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a sweep.

    Attributes:
        name: what tells it from the others, for people.
        config: static settings; ``max_buffer_size`` is left to the sweep when None.
        hparams: traced settings, Python numbers, as made by ``train.make_hparams``.
    """

    name: str
    config: Config
    hparams: HParams


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
        protocol: settings of a published experiment by one name, see ``protocols``; ``settings``
            win over them.
        settings: fields of ``Config`` and ``HParams``, and parameters of objectives where no field
            has that name. A list is swept, anything else is one value (``hidden_sizes``: a tuple).

    Returns:
        runs; seeds vary fastest, then parameters of objectives, then traced settings.

    Raises:
        ConfigError: a setting is unknown, not valid, or fits no objective of the sweep.
    """
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise ConfigError("seeds", seeds, "an integer >= 1")
    top = 2**31 - seeds
    if not isinstance(seed_offset, int) or not 0 <= seed_offset <= top:
        raise ConfigError("seed_offset", seed_offset, f"an integer in [0, {top}]")
    if "seed" in settings:
        raise ConfigError("seed", settings["seed"], "left out: give seeds and seed_offset")
    if protocol is not None:
        settings = protocols.settings(protocol) | settings
    static = {k: _values(k, v) for k, v in settings.items() if k in CONFIG_FIELDS}
    traced = {k: _values(k, v) for k, v in settings.items() if k in HPARAM_FIELDS}
    own = {k: v for k, v in settings.items() if k not in static and k not in traced}
    own |= objective_args or {}
    specs = [objectives.spec(o) for o in static.get("objective", [_CONFIG_DEFAULTS.objective])]
    known = {name for spec in specs for name in spec.params}
    if protocol is not None:
        own = protocols.objective_params(protocol, known) | own
    own = {k: _values(k, v) for k, v in own.items()}
    _check_used(own, [spec.name for spec in specs], known)

    runs: dict[Any, Run] = {}
    chosen = static.get("selection", [])
    kernels = any(spec.takes_kernel for spec in specs)
    for fixed in _product(static):
        spec = objectives.spec(fixed.get("objective", _CONFIG_DEFAULTS.objective))
        if kernels and not spec.takes_kernel:
            fixed.pop("kernel", None)
        config = _config(selection.own_settings(fixed, chosen) if chosen else fixed)
        takes = {name: values for name, values in own.items() if name in spec.params}
        for numbers in _product(traced):
            for parameters in _product(takes):
                for seed in range(seed_offset, seed_offset + seeds):
                    hparams = train.make_hparams(
                        config, seed=seed, objective_params=parameters, **numbers
                    )
                    run = Run(_name(config, parameters, numbers, seed), config, hparams)
                    runs.setdefault(_identity(run), run)
    return list(runs.values())


def described(run: Run) -> dict[str, Any]:
    """Every setting of a run by name, with environment and objective as they are called."""
    settings = dataclasses.asdict(
        dataclasses.replace(run.config, env=None, objective=None, selection=None)
    ) | dataclasses.asdict(run.hparams)
    settings.pop("max_buffer_size")
    parameters = settings.pop("objective_params")
    named = {
        "env": env_name(run.config.env),
        "selection": selection.name_of(run.config.selection),
        "objective": objectives.spec(run.config.objective).name,
    }
    return settings | parameters | named


def env_name(env: Any) -> str:
    """Name of an environment given by name or as an object."""
    return env if isinstance(env, str) else str(env.name)


def encode(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Runs as JSON: one entry for each static configuration, with the settings of its runs."""
    groups: dict[Config, dict[str, Any]] = {}
    for index, run in enumerate(runs):
        if run.config not in groups:
            config = {name: getattr(run.config, name) for name in CONFIG_FIELDS}
            config["env"] = _encode_reference(run.config.env, env_name)
            config["selection"] = _encode_reference(run.config.selection, selection.name_of)
            config["objective"] = _encode_objective(run.config.objective)
            groups[run.config] = {"config": config, "runs": []}
        hparams = {n: _plain(v) for n, v in dataclasses.asdict(run.hparams).items()}
        groups[run.config]["runs"].append({"run": index, "name": run.name} | hparams)
    return list(groups.values())


def decode(
    groups: Iterable[Mapping[str, Any]], env: Any = None, objective: Any = None
) -> list[Run]:
    """Runs from ``encode``'s JSON.

    Args:
        groups: the JSON.
        env: environment object, where the runs were made with one.
        objective: function, where it does not come from a file of its own.

    Raises:
        ConfigError: an environment or objective is needed and not given, or its file has changed.
    """
    runs: dict[int, Run] = {}
    for group in groups:
        # JSON has no tuples.
        stored: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in group["config"].items()
        }
        stored["env"] = _decode_reference("env", stored["env"], env, env_name)
        stored["selection"] = _decode_reference(
            "selection", stored["selection"], None, selection.name_of
        )
        stored["objective"] = _decode_objective(stored["objective"], objective)
        config = Config(**stored)
        for entry in group["runs"]:
            hparams = {k: _numbers(v) for k, v in entry.items() if k not in ("run", "name")}
            runs[entry["run"]] = Run(entry["name"], config, HParams(**hparams))
    return [runs[index] for index in sorted(runs)]


def difference(stored: Sequence[Any], given: Sequence[Any]) -> tuple[str, Any, Any] | None:
    """The first setting in which two results of ``encode`` differ: its name and both values."""
    before, now = (sum(len(group["runs"]) for group in groups) for groups in (stored, given))
    if before != now:
        return "number of runs", before, now
    for old, new in zip(stored, given, strict=False):
        pairs = [(old["config"], new["config"]), *zip(old["runs"], new["runs"], strict=False)]
        for left, right in pairs:
            for name in left | right:
                values = left.get(name), right.get(name)
                if name != "name" and _placeless(values[0]) != _placeless(values[1]):
                    return name, *values
    return None


def _placeless(value: Any) -> Any:
    """A stored setting without the place of its file: the same code elsewhere is the same."""
    return {k: v for k, v in value.items() if k != "file"} if isinstance(value, dict) else value


def load_objective(reference: str) -> Callable[..., Any]:
    """The function that ``path/to/file.py:function`` names.

    Raises:
        ConfigError: no such file or function, or running the file fails.
    """
    function = user_files.load("objective", reference, "FUNCTION")
    if not callable(function):
        name = reference.rpartition(":")[2]
        raise ConfigError("objective", reference, f"FILE.py:FUNCTION, but {name} is no function")
    return function


def source_file(function: Any) -> Path | None:
    """The file a function was written in, if it has one."""
    try:
        name = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        return None
    return Path(name).resolve() if name and Path(name).is_file() else None


def _values(name: str, value: Any) -> list[Any]:
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


def _product(settings: Mapping[str, Sequence[Any]]) -> Iterable[dict[str, Any]]:
    for values in itertools.product(*settings.values()):
        yield dict(zip(settings, values, strict=True))


def _name(
    config: Config, parameters: Mapping[str, Any], numbers: Mapping[str, Any], seed: int
) -> str:
    parts = [env_name(config.env), objectives.spec(config.objective).name]
    if config.kernel != _CONFIG_DEFAULTS.kernel:
        parts.append(config.kernel)
    if config.ratio_level is not None:
        parts.append(config.ratio_level)
    if config.selection != _CONFIG_DEFAULTS.selection:
        parts.append(selection.name_of(config.selection))
    parts += [f"{key}={value}" for key, value in ({**numbers, **parameters}).items()]
    return " ".join([*parts, f"seed={seed}"])


def _identity(run: Run) -> Any:
    numbers = dataclasses.asdict(run.hparams)
    parameters = numbers.pop("objective_params")
    return run.config, tuple(numbers.values()), tuple(sorted(parameters.items()))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    value = value.item() if hasattr(value, "item") else value
    # JSON has no infinity.
    return str(value) if value in (math.inf, -math.inf) else value


def _numbers(stored: Any) -> Any:
    if isinstance(stored, dict):
        return {key: _numbers(item) for key, item in stored.items()}
    return float(stored) if isinstance(stored, str) else stored


def _encode_reference(value: Any, name: Callable[[Any], str]) -> Any:
    """A setting that is a name, FILE.py:NAME or an object, as JSON."""
    if not isinstance(value, str):
        return {"object": name(value)}
    if not user_files.is_reference(value):
        return value
    file = Path(value.rpartition(":")[0]).expanduser().resolve()
    return {"reference": value, "file": str(file), "sha256": user_files.digest(file)}


def _decode_reference(field: str, stored: Any, given: Any, name: Callable[[Any], str]) -> Any:
    if isinstance(stored, str):
        return stored
    if "reference" in stored:
        reference, file = stored["reference"], Path(stored["file"])
        if file.is_file() and user_files.digest(file) != stored["sha256"]:
            valid = "the file as it was when the sweep began; it has changed since"
            raise ConfigError(field, reference, valid)
        # By the path that the sweep was given, if it still leads there.
        here = Path(reference.rpartition(":")[0]).expanduser().resolve() == file
        return reference if here else f"{file}:{reference.rpartition(':')[2]}"
    if given is None or name(given) != stored["object"]:
        raise ConfigError(field, given, f"the object {stored['object']} of this sweep")
    return given


def _encode_objective(objective: Any) -> Any:
    if isinstance(objective, str):
        return objective
    name = objectives.spec(objective).name
    if objectives.KNOWN.get(name) is objective:
        return name
    file = source_file(objective)
    if file is None:
        return {"function": name}
    return {"function": name, "file": str(file), "sha256": user_files.digest(file)}


def _decode_objective(stored: Any, given: Any) -> Any:
    if isinstance(stored, str):
        return stored
    name = stored["function"]
    if given is not None and objectives.spec(given).name == name:
        return given
    if "file" not in stored:
        raise ConfigError("objective", given, f"the function {name} of this sweep")
    if (
        Path(stored["file"]).is_file()
        and user_files.digest(Path(stored["file"])) != stored["sha256"]
    ):
        valid = "the file as it was when the sweep began; it has changed since"
        raise ConfigError("objective", f"{stored['file']}:{name}", valid)
    return load_objective(f"{stored['file']}:{name}")
