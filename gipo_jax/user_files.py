"""What is the user's own, such as an objective or environment: FILE.py:NAME, or an object."""

import functools
import hashlib
import importlib.util
import inspect
import sys
import traceback
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gipo_jax.config import ConfigError


def is_reference(name: str) -> bool:
    """Whether a name means something in a file."""
    return ".py:" in name


def load(field: str, reference: str, what: str) -> Any:
    """What ``path/to/file.py:name`` names; ``what`` is FUNCTION or the like, for messages.

    A file runs once a process. Raises ConfigError where that fails, or there is no such name.
    """
    path, _, name = reference.rpartition(":")
    file, form = Path(path).expanduser().resolve(), f"FILE.py:{what}"
    if not file.is_file():
        raise ConfigError(field, reference, f"{form}, but there is no file {path}")
    module_name = f"gipo_jax_user_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if module_name not in sys.modules:
        loading = importlib.util.spec_from_file_location(module_name, file)
        if loading is None or loading.loader is None:
            raise ConfigError(field, reference, f"{form} with a Python file")
        module = importlib.util.module_from_spec(loading)
        sys.modules[module_name] = module
        try:
            loading.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise ConfigError(field, reference, located(error, file) or str(error)) from error
    found = getattr(sys.modules[module_name], name, None)
    if found is None:
        raise ConfigError(field, reference, f"{form}, but {path} has no {name}")
    return found


def resolve(field: str, value: Any) -> Any:
    """The object that a setting means: what FILE.py:NAME names, or else the value itself.

    A class or function without arguments makes the object, once. Raises ConfigError.
    """
    named = isinstance(value, str) and is_reference(value)
    found = load(field, value, "NAME") if named else value
    if not isinstance(found, type) and not inspect.isfunction(found):
        return found
    try:
        return _made(found)
    except ConfigError:
        raise
    except Exception as error:
        file = source_file(found)
        place = (file and located(error, file)) or f"{type(error).__name__}: {error}"
        valid = f"a class or function that makes it without arguments; {place}"
        raise ConfigError(field, value if named else found.__name__, valid) from error


@functools.cache
def _made(maker: Any) -> Any:
    return maker()


def located(error: BaseException, file: Path) -> str | None:
    """Where in a user's file an error arose and what it says; None where none of it was running."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
    if not frames and not isinstance(error, SyntaxError):
        return None
    place = f"{file}:{error.lineno}" if isinstance(error, SyntaxError) else ""
    if frames:
        place = f"{file}:{frames[-1].lineno}, in {frames[-1].name}"
    text = (str(error).strip().splitlines() or [""])[0]
    return f"code that runs; {place}: {type(error).__name__}: {text}"


def digest(file: Path) -> str:
    """SHA-256 of a file, to see whether it has changed."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def values_digest(value: Any) -> str:
    """Digest of the values that a function or object carries, whatever its code.

    They are those closed over, bound or by default, and attributes; of what has none of these, the
    type. Functions that a factory made, and objects of one class, differ in it.
    """
    found = hashlib.sha256()
    _digest_values(lambda text: found.update(text.encode() + b"\0"), value, {})
    return found.hexdigest()[:16]


def _digest_values(add: Callable[[str], None], value: Any, seen: dict[int, Any]) -> None:
    value = inspect.unwrap(value) if callable(value) else value
    if isinstance(value, str | bytes | int | float | complex | None):
        return add(repr(value))
    if isinstance(value, types.ModuleType | type):
        return add(value.__name__)
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        return add(f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}")
    add(type(value).__qualname__)
    if id(value) in seen:
        return None
    # Kept, so that no other object gets its id.
    seen[id(value)] = value
    if isinstance(value, set | frozenset):
        return add(repr(sorted(map(repr, value))))
    for part in _parts(value):
        _digest_values(add, part, seen)


def _parts(value: Any) -> Iterable[Any]:
    """What a value is made of."""
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, dict):
        return sorted(value.items(), key=lambda item: repr(item[0]))
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, types.FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or () if c != types.CellType()]
        return value.__qualname__, value.__defaults__, value.__kwdefaults__, cells
    # What a property has computed is there or not.
    computed = {n for n, x in vars(type(value)).items() if isinstance(x, functools.cached_property)}
    own = getattr(value, "__dict__", {})
    return [(name, own[name]) for name in sorted(own) if name not in computed]


def source_file(function: Any) -> Path | None:
    """The file a function was written in, if it has one."""
    try:
        name = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        return None
    return Path(name).resolve() if name and Path(name).is_file() else None


class Reference(NamedTuple):
    """What stands in JSON for a setting of the user's own."""

    kind: str  # reference: a text FILE.py:NAME; function and object: what it is called
    name: str
    file: str | None = None  # where it is written, if known, and
    sha256: str | None = None  # what was in there when the sweep began
    values: str | None = None  # digest of the values that a function or object carries

    @classmethod
    def of(cls, value: Any, kind: str, name: str) -> "Reference":
        """The reference to a text, function or object that is called ``name``."""
        file = source_file(value) if kind == "function" else None
        if kind == "reference":
            file = Path(name.rpartition(":")[0]).expanduser().resolve()
        place, sha256 = (str(file), digest(file)) if file else (None, None)
        return cls(kind, name, place, sha256, None if kind == "reference" else values_digest(value))

    def to_json(self) -> dict[str, Any]:
        """The form in config.json."""
        where = {"file": self.file, "sha256": self.sha256} if self.file else {}
        carried = {"values": self.values} if self.values else {}
        return {self.kind: self.name, **where, **carried}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Reference":
        """What ``to_json`` wrote."""
        kind = next(name for name in ("reference", "function", "object") if name in stored)
        rest = {key: stored.get(key) for key in ("file", "sha256", "values")}
        return cls(kind, stored[kind], **rest)

    def same(self, other: "Reference") -> bool:
        """Whether both stand for the same code and values, wherever the code lies."""
        one, two = (
            (x.kind, x.name.rpartition(":")[2] if x.file else x.name, x.sha256)
            for x in (self, other)
        )
        return one == two and (self.values == other.values or None in (self.values, other.values))

    def check_values(self, field: str, found: Any) -> Any:
        """What was found for it, unless it carries other values than when the sweep began."""
        if self.values not in (None, values_digest(found)):
            valid = f"the {self.kind} {self.name} of this sweep; it closes over other values now"
            raise ConfigError(field, self.name, valid)
        return found

    def find(self, field: str, given: Any, called: str | None) -> Any:
        """What it stands for: ``given``, called so, or FILE.py:NAME in a file as it was."""
        if given is not None and called == self.name:
            return self.check_values(field, given)
        texts = [self.name] if self.kind == "reference" else []
        if self.file:
            texts.append(f"{self.file}:{self.name.rpartition(':')[2]}")
        files = [Path(text.rpartition(":")[0]).expanduser() for text in texts]
        for text, file in zip(texts, files, strict=True):
            if file.is_file() and digest(file) == self.sha256:
                return text
        if given is not None and self.kind == "reference":
            return given
        if any(file.is_file() for file in files):
            valid = "the file as it was when the sweep began; it has changed since"
            raise ConfigError(field, texts[0], valid)
        where = f", whose file {self.file} is gone" if self.file else ""
        raise ConfigError(field, given, f"the {self.kind} {self.name} of this sweep{where}")
