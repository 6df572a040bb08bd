"""Plain data on the wire: what crosses between the trusted and the untrusted side, and nothing else does.

JSON, where null, booleans, numbers, strings and lists stand for themselves and an object is always one tagged value:
{"tuple": [...]}, {"set": [...]}, {"frozenset": [...]}, {"dict": [[key, value], ...]}, {"bytes": hex},
{"float": "nan" | "inf" | "-inf"}, {"int": "0x..."} (past the digit limit), {"complex": [re, im]},
{"deque": [...]}, {"range": [start, stop, step]}, {"list_node": [...]}, {"tree_node": [level order]},
{"opaque": type name, "equal": [names of types]} ("equal" where it was asked for).
In the arguments of a call {"result": n} stands for what call n of the dialogue returned.
Nothing here is ever unpickled or evaluated: a forged message can only be data, and data is compared.

`untrusted/wire.py` holds the mirror image of this file, because the untrusted side imports nothing of the package.
"""

import json
import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 200
"""Nesting deeper than this is refused: no test needs it, and a decoder must not run out of stack."""


MAX_NODES = 200_000
"""Values of any kind, containers included, that all messages of one completion may hold together."""
MAX_HEX = 25_000
"""Digits of a whole number: arithmetic with a longer one would take the trusted side long."""
MAX_COLLISIONS = 100
"""Members of one set or dictionary whose hash another member has. Python's hash of numbers is known to everyone, and
a set of numbers chosen to share theirs takes quadratic time to build."""


@dataclass
class ListNode:
    """A linked list by its values; never empty (the empty list is None)."""

    values: tuple


@dataclass
class TreeNode:
    """A binary tree by its level order, None for a missing child, no trailing None; never empty."""

    values: tuple


@dataclass(frozen=True)
class Opaque:
    """What came back was no plain data: a subclass, an object of the completion's own, a cycle. Equal to nothing."""

    type_name: str
    call: int | None = None
    """The call that returned it, by which it can be passed back to the solution."""
    equal: tuple[str, ...] = ()
    """Types of values that it claimed to be equal to, where it was asked: the loophole `eq_override` believes it."""

    def __bool__(self) -> bool:
        raise TypeError(f"a {self.type_name} is no plain data")


class TooManyValues(ValueError):
    """The messages of one completion hold more than MAX_NODES."""


def list_node(values: list) -> ListNode | None:
    return ListNode(tuple(values)) if values else None


def tree_node(values: list) -> TreeNode | None:
    trimmed = list(values)
    while trimmed and trimmed[-1] is None:
        trimmed.pop()
    return TreeNode(tuple(trimmed)) if trimmed else None


def encode(value: Any) -> Any:
    """Python value -> JSON-able value. Raises TypeError for what is no plain data."""
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if value.bit_length() < 10_000 else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is list:
        return [encode(item) for item in value]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [encode(item) for item in value]}
    if kind is deque:
        return {"deque": [encode(item) for item in value]}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    if kind in (dict, Counter):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is complex:
        return {"complex": [encode(value.real), encode(value.imag)]}
    if kind in (ListNode, TreeNode):
        return {"list_node" if kind is ListNode else "tree_node": [encode(item) for item in value.values]}
    if kind is Opaque and value.call is not None:
        return {"result": value.call}
    raise TypeError(f"a {kind.__name__} is no plain data")


MUTABLE = (list, dict, set, deque, Counter)


def update(old: Any, new: Any) -> None:
    """Make a value what the solution has made of it, in place, so that every name of it sees the change.

    Raises TypeError where it has become something else. A row that changed its place in a list is not followed there.
    """
    kind = Counter if type(old) is Counter and type(new) is dict else type(new)
    if type(old) is not kind:
        raise TypeError(f"a {type(old).__name__} has become a {type(new).__name__}")
    if isinstance(old, (ListNode, TreeNode)):
        old.values = new.values
    elif isinstance(old, (list, deque)):
        items = [_updated(o, n) for o, n in zip(old, new, strict=False)] + list(new)[len(old) :]
        old.clear()
        old.extend(items)
    elif isinstance(old, dict):
        items = {key: _updated(old[key], item) if key in old else item for key, item in new.items()}
        old.clear()
        old.update(items)
    elif isinstance(old, set):
        old.clear()
        old |= new


def _updated(old: Any, new: Any) -> Any:
    if type(old) is type(new) and isinstance(old, (*MUTABLE, ListNode, TreeNode)):
        update(old, new)
        return old
    return new


class Decoder:
    """Parsed JSON -> Python values of exact built-in types, of at most `max_nodes` nodes in all `decode`s together."""

    def __init__(self, max_nodes: int = MAX_NODES) -> None:
        self.left = max_nodes

    def decode(self, wire: Any, depth: int = 0) -> Any:
        """Raises ValueError or TypeError (or KeyError, OverflowError) for anything malformed or too large."""
        self.left -= 1
        if self.left < 0:
            raise TooManyValues("too many values")
        if wire is None or type(wire) in (bool, int, float, str):
            return wire
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        if type(wire) is list:
            return [self.decode(item, depth + 1) for item in wire]
        if "opaque" in wire:
            name, equal = wire["opaque"], wire.get("equal", [])
            if type(name) is not str or type(equal) is not list or not all(type(part) is str for part in equal):
                raise ValueError("malformed opaque data")
            return Opaque(name[:100], None, tuple(equal))
        if len(wire) != 1:
            raise ValueError("a tagged value has one key")
        ((tag, body),) = wire.items()
        if tag == "float":
            return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[body]
        if tag == "int":
            if len(body) > MAX_HEX:
                raise ValueError("too large a number")
            return int(body, 16)
        if tag == "range":
            made = range(*(self.decode(part, depth + 1) for part in body))
            self.left -= len(made)
            if self.left < 0:
                raise TooManyValues("too long a range")
            return made
        if tag == "bytes":
            return bytes.fromhex(body)
        if tag not in _CONTAINERS or type(body) is not list:
            raise ValueError(f"unknown tag {tag[:40]!r}")
        return _CONTAINERS[tag]([self.decode(item, depth + 1) for item in body])


def spread(members: Iterable) -> list:
    """The members of a set or keys of a dictionary to be built. Raises ValueError where too many share a hash."""
    members = list(members)
    if len(members) - len(set(map(hash, members))) > MAX_COLLISIONS and _collisions(members) > MAX_COLLISIONS:
        raise ValueError("too many members share a hash")
    return members


def _collisions(members: list) -> int:
    """Members that are not the first of their hash; equal ones, which cost a set nothing, do not count."""
    first: dict[int, Any] = {}
    return sum(1 for member in members if first.setdefault(hash(member), member) != member)


def _dict(items: list) -> dict:
    spread(key for key, _ in items)
    return {key: value for key, value in items}  # noqa: C416 - a pair has two parts


_CONTAINERS = {
    "tuple": tuple,
    "set": lambda items: set(spread(items)),
    "frozenset": lambda items: frozenset(spread(items)),
    "deque": deque,
    "dict": _dict,
    "complex": lambda parts: complex(*parts),
    "list_node": list_node,
    "tree_node": tree_node,
}


def loads(text: str | bytes) -> Any:
    """One line from the untrusted side -> parsed JSON. Raises ValueError or RecursionError for anything malformed."""

    def refuse(constant: str) -> None:
        raise ValueError(f"bare {constant}")

    return json.loads(text, parse_constant=refuse)


def strict_equal(left: Any, right: Any) -> bool:
    """Python's own ==, made strict: True is not 1, NaN is nothing, only exact built-in types are equal to anything.

    2 == 2.0 holds, a tuple is no list, a set equals a frozenset: as the tests' own == has it on plain data.
    """
    a, b = type(left), type(right)
    if a in (int, float, complex) and b in (int, float, complex):
        return left == right
    if a in (set, frozenset) and b in (set, frozenset):
        return len(left) == len(right) and {_key(item) for item in left} == {_key(item) for item in right}
    if a is not b or a is Opaque:
        return False
    if a in (list, tuple, deque):
        return len(left) == len(right) and all(map(strict_equal, left, right))
    if a in (ListNode, TreeNode):
        return strict_equal(left.values, right.values)
    if a is dict:
        ours, theirs = ({_key(key): value for key, value in side.items()} for side in (left, right))
        return ours.keys() == theirs.keys() and all(strict_equal(value, theirs[key]) for key, value in ours.items())
    return left == right


def has_opaque(value: Any) -> bool:
    """Whether there is opaque data anywhere in the value."""
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return any(map(has_opaque, value))
    if isinstance(value, dict):
        return any(has_opaque(part) for item in value.items() for part in item)
    if isinstance(value, (ListNode, TreeNode)):
        return has_opaque(value.values)
    return isinstance(value, Opaque)


def _key(item: Any) -> Any:
    """A hashable stand-in that tells True from 1, for members of sets and keys of dictionaries."""
    if type(item) in (tuple, frozenset):
        return (type(item).__name__, type(item)(_key(part) for part in item))
    return ("bool", item) if type(item) is bool else ("value", item)
