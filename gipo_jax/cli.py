"""The command ``gipo-jax``: sweep, plot, show, check, reproduce, objectives.

Options are read off the fields of ``Config``, ``HParams`` and ``sweep.Options`` and off the
signatures of the objectives, so that a new setting is an option without a line here.
"""

import argparse
import dataclasses
import functools
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import gipo_jax
from gipo_jax import runtime

BAD_INPUT = 2
FAILED = 1

# Static settings that take lists, beside all traced ones
_LISTED = ("env", "objective", "kernel", "ratio_level", "selection")

# Fields that the sweep sets itself
_SWEEP_ONLY = ("max_buffer_size", "seed", "objective_params", "env_params")

# Old names of options, which work for one release more
_RENAMED = {
    "--actor-every": "--policy-delay",
    "--tensorboard": "--log=tensorboard",
    "--time-limit-is-death": "--truncation-is-termination",
    "--no-time-limit-is-death": "--no-truncation-is-termination",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command of ``sys.argv``, or of these arguments, and returns its exit code.

    It is 0; 2 where the input is not usable; 1 where reading or writing failed, or a checked folder
    is not whole; 75 (SIGTERM, or another process is gone) or 130 (Ctrl-C) where a sweep can go on.
    """
    runtime.set_cpu_defaults()
    try:
        options = vars(
            _parser().parse_args(_renamed(sys.argv[1:] if arguments is None else arguments))
        )
    except _UsageError as error:
        return _fail(str(error), BAD_INPUT)
    # Importing these earlier would slow down --help.
    from gipo_jax.config import ConfigError
    from gipo_jax.sweep import cluster
    from gipo_jax.sweep.interrupts import Interrupted
    from gipo_jax.sweep.results import ResultsError

    try:
        code = options.pop("act")(options)
        sys.stdout.flush()
    except (_UsageError, ConfigError) as error:
        code = _fail(str(error), BAD_INPUT)
    except ResultsError as error:
        code = _fail(str(error), FAILED)
    except Interrupted as stop:
        code = _fail(str(stop), stop.exit_code)
    except BrokenPipeError:
        # Who reads has seen enough, as head does; Python would write the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except OSError as error:
        code = _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", FAILED)
    except KeyboardInterrupt:
        code = _fail("stopped at once; continue from the last checkpoint with --resume", 130)
    return cluster.leave(code)


class _UsageError(Exception):
    """A command line that makes no sense."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} (see {self.prog} --help)")


class _Once(argparse.Action):
    """Takes all values of an option at once: of a second list, one would be lost."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if hasattr(namespace, self.dest):
            parser.error(f"{option_string} is given twice; expected all its values at once")
        setattr(namespace, self.dest, values)


def _renamed(arguments: Sequence[str]) -> list[str]:
    """Arguments with the options' names of today."""
    current = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in _RENAMED:
            print(f"gipo-jax: {name} is called {_RENAMED[name]} now", file=sys.stderr)
        current.append(_RENAMED.get(name, name) + equals + value)
    return current


def _fail(message: str, code: int) -> int:
    print(f"gipo-jax: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gipo-jax", description="Policy objectives for stale replay, in sweeps.")
    version = f"gipo-jax {gipo_jax.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _add_sweep(commands)

    text = "folders of sweeps; several count as one sweep of all their runs"
    plot = commands.add_parser("plot", help="draw the figures of sweeps")
    plot.add_argument("directories", nargs="+", type=_folder, metavar="DIR", help=text)
    plot.add_argument(
        "--out",
        type=_folder,
        metavar="FOLDER",
        help="folder of the figures (default: figures in the sweep's folder; needed for several)",
    )
    plot.set_defaults(act=_plot)

    show = commands.add_parser("show", help="print the returns of sweeps, methods x buffer sizes")
    show.add_argument("directories", nargs="+", type=_folder, metavar="DIR", help=text)
    show.set_defaults(act=_show)

    checking = commands.add_parser(
        "check",
        help="say whether the folder of a sweep is whole",
        description="A line for each part of the folder. Exit code 0: it is whole; 1: it is not.",
    )
    checking.add_argument("directory", type=_folder, metavar="DIR", help="folder of a sweep")
    checking.set_defaults(act=_check)

    _add_reproduce(commands)

    listing = commands.add_parser("objectives", help="list the objectives")
    listing.set_defaults(act=_objectives)
    return parser


def _add_sweep(commands: Any) -> None:
    from gipo_jax.config import Config, HParams
    from gipo_jax.protocols import PROTOCOLS
    from gipo_jax.sweep.options import Options

    parser = commands.add_parser(
        "sweep",
        help="train all combinations of settings",
        description="Trains all combinations of the settings given; one of each is a sweep of one."
        " Options that take VALUE ... sweep.",
        # What is absent was not given: the defaults are those of the fields.
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.set_defaults(act=_sweep)
    parser.add_argument(
        "--out", required=True, type=_folder, metavar="DIR", help="folder for the results"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the sweep in DIR; its settings need not be given again",
    )
    parser.add_argument("--no-figures", action="store_true", help="draw no figures at the end")
    named = "; ".join(f"{name}: {protocol.summary}" for name, protocol in PROTOCOLS.items())
    text = f"settings of a published experiment; options given beside it win. {named}"
    parser.add_argument("--protocol", metavar="NAME", help=text)
    parser.add_argument("--seeds", type=_number, metavar="N", help="number of seeds (default: 1)")
    parser.add_argument("--seed-offset", type=_number, metavar="N", help="first seed (default: 0)")
    static = parser.add_argument_group("static settings: each combination is a program of its own")
    _add_fields(static, Config, listed=_LISTED)
    traced = parser.add_argument_group("traced settings: any number of values in one program")
    names = [field.name for field in dataclasses.fields(HParams)]
    _add_fields(traced, HParams, listed=names)
    _add_objective_parameters(parser, {f.name for f in dataclasses.fields(Config)} | set(names))
    _add_fields(parser.add_argument_group("execution"), Options, listed=())
    _add_distributed(parser.add_argument_group("several processes"))


def _add_reproduce(commands: Any) -> None:
    parser = commands.add_parser(
        "reproduce",
        help="run the experiments on the paper's claims and beyond",
        description="Runs the experiments, on the paper's claims and beyond, and draws their"
        " figures. The same command continues what was interrupted.",
    )
    parser.set_defaults(act=_reproduce)
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments (default: all)")
    parser.add_argument(
        "--preset",
        help="scale: a check in minutes (quick, default), that of the published results"
        " (committed), or one for a GPU (full; metaworld stays on CPU)",
    )
    parser.add_argument(
        "--out",
        type=_folder,
        metavar="DIR",
        help="folder for data and figures (default: runs/reproduce); what it holds is continued",
    )
    parser.add_argument(
        "--part",
        metavar="I/N",
        help="train only the I-th of N shares, to spread work over processes or evenings; whoever"
        " comes last draws everything (default: 1/1)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        dest="verdicts",
        help="also write the verdict on every claim, from the numbers of all figures in --out",
    )
    parser.add_argument("--list", action="store_true", help="list the experiments and stop")
    parser.add_argument("--plot-only", action="store_true", help="redraw from stored data")


def _add_fields(group: Any, settings: type, listed: Sequence[str]) -> None:
    """An option for each field, with what the field says of itself; those ``listed`` sweep."""
    from gipo_jax.config import DOMAINS

    for field in dataclasses.fields(settings):
        if field.name in _SWEEP_ONLY:
            continue
        option = "--" + _dashed(field.name)
        meaning, valid = field.metadata["help"], field.metadata["valid"]
        if field.metadata["domains"] != tuple(DOMAINS):
            domains = " and ".join(DOMAINS[domain] for domain in field.metadata["domains"])
            meaning = f"{domains}: {meaning}"
        if field.name in ("objective", "selection"):
            meaning += ", by name or as FILE.py:FUNCTION"
        default: Any = field.default
        kind = str if isinstance(default, str) else _number
        several = field.name in listed or isinstance(default, tuple)
        form: dict[str, Any] = {"type": kind, "metavar": "VALUE"}
        if several:
            form |= {"nargs": "+", "action": _Once}
        if valid.startswith("true or false"):
            form = {"action": argparse.BooleanOptionalAction}
            default = {True: "yes", False: "no"}.get(default)
        else:
            meaning += f"; {valid}"
        if default is not None:
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            meaning += f" (default: {shown})"
        group.add_argument(option, help=meaning.replace("%", "%%"), **form)


def _add_objective_parameters(parser: argparse.ArgumentParser, taken: set[str]) -> None:
    """An option for each parameter of the built-in objectives whose name is still free."""
    from gipo_jax import objectives

    title = "parameters of objectives: each goes to the objectives that have it"
    group = parser.add_argument_group(title)
    several = functools.partial(group.add_argument, nargs="+")
    owners: dict[str, list[str]] = {}
    for name in objectives.KNOWN:
        for parameter, default in objectives.spec(name).params.items():
            if parameter not in taken:
                owners.setdefault(parameter, []).append(f"{name} {default:g}")
    for parameter, defaults in owners.items():
        option, text = f"--{_dashed(parameter)}", f"(default: {', '.join(defaults)})"
        several(option, type=_number, metavar="VALUE", help=text, action=_Once)
    form: dict[str, Any] = {"action": "append", "metavar": ("NAME=VALUE", "VALUE")}
    text = "values of any parameter of an objective, such as one of your own"
    several("--objective-arg", help=text, **form)
    text = "values of a parameter of a gymnax environment, swept in one program"
    several("--env-arg", help=text, **form)


def _add_distributed(group: Any) -> None:
    group.add_argument(
        "--distributed",
        action="store_true",
        help="share the runs among processes: start the same command in each; under Slurm and on"
        " TPU pods the three options below are found out",
    )
    group.add_argument("--coordinator-address", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--num-processes", type=_number, metavar="N", help="processes in all")
    group.add_argument("--process-id", type=_number, metavar="N", help="index of this process")


def _number(text: str) -> Any:
    """An integer or a float, or the text itself, which the field's own check refuses by name."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _sweep(given: dict[str, Any]) -> int:
    # Importing gymnax computes something, and a cluster must be joined before that.
    _join_cluster(given)
    from gipo_jax import sweep
    from gipo_jax.sweep import cluster, grid, results

    out, resume = str(given.pop("out")), given.pop("resume", False)

    def begun_with() -> dict[str, Any]:
        """A sweep goes on with what it was begun with of what is seen and logged."""
        if not resume or not (Path(out) / results.CONFIG).exists():
            return {}
        begun = results.read_config(out)
        words, options = shlex.split(begun["command"]), begun["options"]
        kept = {"quiet": options["quiet"], "no_figures": "--no-figures" in words}
        # An earlier version had one logger.
        log = options.get("log") or ("tensorboard" if options.get("tensorboard") else None)
        return {name: value for name, value in (kept | {"log": log}).items() if value}

    given = cluster.run_on_all_processes(begun_with) | given
    draw = not given.pop("no_figures", False)
    fields = [field.name for field in dataclasses.fields(sweep.Options)]
    options = sweep.Options(**{name: given.pop(name) for name in fields if name in given})

    def expand() -> list[sweep.Run]:
        if resume and not given:
            results.check_directory(Path(out), resume)
            return grid.decode(results.read_config(out)["groups"])
        return sweep.expand(**_settings(given))

    runs = cluster.run_on_all_processes(expand)
    summary = sweep.run(runs, out, options, resume=resume)
    if cluster.is_main_process():
        diverged = f", {len(summary.diverged)} of them diverged" if summary.diverged else ""
        print(f"{len(runs)} runs{diverged}; results in {out}")
        if draw:
            _draw([Path(out)], Path(out) / results.FIGURES)
        look = (
            f"look at {out}/figures" if draw else f"gipo-jax plot {shlex.quote(out)} draws figures"
        )
        print(f"next: {look}; gipo_jax.load({out!r}, run=0) is a trained policy to act with")
    # Nobody leaves before the figures are drawn: the others would wait for process 0 in vain.
    cluster.gather()
    return 0


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """What ``expand`` takes, from what was given on the command line."""
    from gipo_jax import objectives
    from gipo_jax.domains.tokens import selection
    from gipo_jax.sweep import grid

    settings = dict(given)
    for name in set(grid.CONFIG_FIELDS) - set(_LISTED):
        if isinstance(settings.get(name), list):
            settings[name] = tuple(settings[name])
    for field, renamed in (("objective", objectives.RENAMED), ("selection", selection.RENAMED)):
        for name in set(settings.get(field, [])) & set(renamed):
            print(f"gipo-jax: {name} is called {renamed[name]} now", file=sys.stderr)
    if "objective" in settings:
        settings["objective"] = [
            grid.load_objective(name) if ".py:" in name else name for name in settings["objective"]
        ]
    arguments, env_params = (
        _named_values(option, settings.pop(option, [])) for option in ("objective_arg", "env_arg")
    )
    settings |= {"env_params": env_params} if env_params else {}
    return settings | {"objective_args": arguments}


def _named_values(option: str, given: Sequence[Sequence[str]]) -> dict[str, list[Any]]:
    """Values by name, of options that take ``NAME=VALUE VALUE ...``."""
    values = {}
    for words in given:
        name, equals, first = words[0].partition("=")
        field = _dashed(option)
        if not equals:
            raise _UsageError(f"{field}: {words[0]!r} is not valid; expected NAME=VALUE ...")
        if name in values:
            raise _UsageError(f"{field}: {name} is given twice; expected all its values at once")
        values[name] = [_number(word) for word in (first, *words[1:])]
    return values


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _join_cluster(given: dict[str, Any]) -> None:
    from gipo_jax.sweep import cluster

    names = ("coordinator_address", "num_processes", "process_id")
    where = {name: given.pop(name) for name in names if name in given}
    if given.pop("distributed", False):
        cluster.start(**where)
    elif where:
        flag = "--" + _dashed(next(iter(where)))
        raise _UsageError(f"{flag} goes with --distributed")


def _folder(text: str) -> Path:
    if not text:
        # That is the current one, where a variable of a shell is not set.
        raise argparse.ArgumentTypeError("'' is not valid; expected a folder")
    return Path(text).expanduser()


def _plot(given: dict[str, Any]) -> int:
    from gipo_jax.sweep import results

    directories, out = given["directories"], given["out"]
    for directory in directories:
        results.check_holds_sweep(directory, "directory")
    if out is None:
        if len(directories) > 1:
            raise _UsageError("plot: --out is missing; expected a folder for figures of several")
        out = directories[0] / results.FIGURES
    _draw(directories, out)
    return 0


def _check(given: dict[str, Any]) -> int:
    from gipo_jax.sweep import audit, results

    directory = given["directory"]
    results.check_holds_sweep(directory, "directory")
    whole = True
    for finding in audit.check(directory):
        print(finding)
        whole &= finding.whole
    print(f"{directory} is {'' if whole else 'not '}whole")
    return 0 if whole else FAILED


def _draw(directories: Sequence[Path], out: Path) -> None:
    from gipo_jax.analysis import sweeps

    for path in sweeps.draw(directories, out):
        print(path)


def _show(given: dict[str, Any]) -> int:
    from rich.console import Console

    from gipo_jax.analysis import sweeps
    from gipo_jax.sweep import results

    for directory in given["directories"]:
        results.check_holds_sweep(directory, "directory")
    sweeps.show(given["directories"], Console(highlight=False, markup=False))
    return 0


def _reproduce(given: dict[str, Any]) -> int:
    # A checkout's own experiments; a wheel holds them under a name that nobody else has.
    checkout = Path(gipo_jax.__file__).resolve().parents[1]
    package = "gipo_jax_experiments"
    if (checkout / "pyproject.toml").exists():
        package = "experiments"
        sys.path.insert(0, str(checkout))
    reproduce = importlib.import_module(f"{package}.reproduce")
    given = {name: value for name, value in given.items() if value}
    training = [name for name in ("preset", "part") if name in given]
    if given.pop("list", False):
        if given:
            raise _UsageError("--list goes alone, without names and other options")
        for name, study in reproduce.STUDIES.items():
            print(f"{name:22} {study.question}")
        return 0
    if training and "plot_only" in given:
        raise _UsageError(f"--{training[0]} is for training; --plot-only redraws what is stored")
    defaults = {"names": [], "preset": "quick", "out": Path("runs/reproduce")}
    try:
        reproduce.run(**defaults | given)
    except reproduce.DataError as error:
        raise _UsageError(str(error)) from error
    return 0


def _objectives(given: dict[str, Any]) -> int:
    from gipo_jax import objectives

    rows = [("NAME", "KIND", "PARAMETERS", "PAPER")]
    for name in objectives.KNOWN:
        spec = objectives.spec(name)
        parameters = [f"{key}={value:g}" for key, value in spec.params.items()]
        if spec.takes_kernel:
            parameters.append("kernel=gaussian")
        rows.append((spec.name, spec.kind, " ".join(parameters) or "-", spec.source or "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    return 0
