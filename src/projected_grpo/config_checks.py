"""What a typed or a saved setting is held to; what does not hold is one line that names the flag."""

from pathlib import Path
from types import UnionType
from typing import Literal, get_args, get_origin

from projected_grpo.errors import InputError


def require(holds: bool, message: str) -> None:
    """Raises InputError with `message` where it does not hold."""
    if not holds:
        raise InputError(message)


def flag(name: str) -> str:
    """Of a field, as it is typed."""
    return f"--{name.replace('_', '-')}"


def at_least(config: object, name: str, least: int) -> None:
    """Refuse an option below `least` in one line."""
    value = getattr(config, name)
    require(value >= least, f"{flag(name)} {value} must be at least {least}")


def is_a(value: object, hint: object) -> bool:
    """Whether a value read from JSON is of a field's type; a whole number stands for a float."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(is_a(item, get_args(hint)[0]) for item in value)
    if isinstance(hint, UnionType):
        return any(is_a(value, part) for part in get_args(hint))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is (str if hint is Path else hint)
