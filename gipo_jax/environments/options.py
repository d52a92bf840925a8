"""Parameters of environments in their names, ``NAME:parameter=value,...``."""

from collections.abc import Mapping
from typing import Any

from gipo_jax.config import ConfigError, is_finite


def base_name(name: str) -> str:
    """The name of an environment without parameters."""
    return name.partition(":")[0]


def read(field: str, name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters in a name, as the type of their default. Raises ConfigError for others."""
    base, colon, given = name.partition(":")
    found: dict[str, Any] = {}
    for part in given.split(",") if colon else []:
        key, _, text = part.partition("=")
        try:
            kind = type(defaults[key])
            found[key] = {"true": True, "false": False}[text] if kind is bool else kind(text)
            if kind is float and not is_finite(found[key]):
                raise ValueError(text)
        except (KeyError, ValueError) as error:
            raise ConfigError(field, name, valid(base, defaults)) from error
    return found


def valid(base: str, defaults: Mapping[str, Any]) -> str:
    """What may be given, for messages."""
    shown = ", ".join(f"{k}={str(v).lower()}" for k, v in defaults.items()) or "none"
    return f"{base}:NAME=VALUE,... with its parameters (defaults: {shown})"
