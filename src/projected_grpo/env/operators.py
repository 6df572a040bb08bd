"""What a test may compute with: operators, comparisons, and a short list of pure functions and methods.

They are Python's own, made strict where a wrong answer could slip through: `==` is `plain.strict_equal`, opaque data
cannot be compared at all, and a bool is no number. What refuses raises, and a test that raises does not hold.
"""

import ast
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from projected_grpo.env import plain

MAX_REPEAT = 1_000_000
"""Items that repeating a sequence may make."""

BINARY: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
}
_UNARY: dict[type, Callable] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Invert: operator.invert,
}
_ORDER: dict[type, Callable] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


def unary(op: type, value: Any) -> Any:
    return _UNARY[op](value) if op is ast.Not else _UNARY[op](_no_bool(value))


def binary(op: type, left: Any, right: Any) -> Any:
    """Raises TypeError for a bool beside a number, OverflowError for what would take too long."""
    _no_mixture(left, right)
    if op is ast.Mult and not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
        repeat = left if isinstance(left, int) else right
        size = len(right if isinstance(left, int) else left)
        if repeat * size > MAX_REPEAT:
            raise OverflowError("repeats a sequence too often")
    if op is ast.Pow and isinstance(left, int) and abs(right) * left.bit_length() > 100_000:
        raise OverflowError("raises to too high a power")
    if op is ast.LShift and right > 100_000:
        raise OverflowError("shifts too far")
    return BINARY[op](left, right)


def compare(op: ast.cmpop, left: Any, right: Any) -> bool:
    """Raises TypeError for opaque data on either side, at any depth, whatever the operator."""
    if isinstance(left, Counter) and isinstance(right, Counter):
        left, right = dict(left), dict(right)
    _no_opaque(left, right)
    match op:
        case ast.Eq():
            return plain.strict_equal(left, right)
        case ast.NotEq():
            return not plain.strict_equal(left, right)
        case ast.In() | ast.NotIn():
            inside = left in right if isinstance(right, str) else any(same(left, item) for item in right)
            return inside is isinstance(op, ast.In)
    if not isinstance(op, ast.Is | ast.IsNot):
        _no_mixture(left, right)
    return _ORDER[type(op)](left, right)


def same(left: Any, right: Any) -> bool:
    """`strict_equal`, but opaque data is neither equal nor unequal to anything: raises TypeError."""
    _no_opaque(left, right)
    return plain.strict_equal(left, right)


def call_method(name: str, owner: Any, *arguments: Any) -> Any:
    """A method of a plain value. Raises TypeError for another owner; IndexError where .index finds nothing."""
    if type(owner) not in (str, list, tuple, dict, set, Counter):
        raise TypeError(f"a {type(owner).__name__} has no .{name}()")
    if type(owner) in (list, tuple) and name in ("count", "index"):
        wanted, start, stop = (*arguments, None, None)[:3]
        found = [i for i in range(len(owner))[start:stop] if same(owner[i], wanted)]
        return len(found) if name == "count" else found[0]
    return getattr(owner, name)(*arguments)


def build_set(members: Iterable = ()) -> set:
    return set(plain.spread(members))


def _frozenset(members: Iterable = ()) -> frozenset:
    return frozenset(plain.spread(members))


def _counter(members: Iterable = ()) -> Counter:
    return Counter(members if isinstance(members, dict) else plain.spread(members))


def _numeric(function: Callable) -> Callable:
    """A function of numbers that takes no bool for one."""
    return lambda *values, **options: function(*map(_no_bool, values), **options)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise TypeError("a bool is no number")
    return value


def _no_mixture(left: Any, right: Any) -> None:
    if isinstance(left, bool) is not isinstance(right, bool) and all(
        isinstance(side, (int, float, complex)) for side in (left, right)
    ):
        raise TypeError("a bool is no number")


def _no_opaque(*values: Any) -> None:
    if any(map(plain.has_opaque, values)):
        raise TypeError("what came back is no plain data")


_BUILTINS: tuple[Callable, ...] = (abs, all, any, bool, dict, divmod, enumerate, float, frozenset, int, isinstance)
_BUILTINS += (len, list, map, max, min)
_BUILTINS += (range, reversed, round, set, sorted, str, sum, tuple, zip, Counter)
FUNCTIONS: dict[str, Callable] = {function.__name__: function for function in _BUILTINS} | {
    "abs": _numeric(abs),
    "divmod": _numeric(divmod),
    "round": _numeric(round),
    "isclose": _numeric(math.isclose),
    "math.isclose": _numeric(math.isclose),
    "math.isnan": math.isnan,
    "set": build_set,
    "frozenset": _frozenset,
    "Counter": _counter,
    "collections.Counter": _counter,
    "list_node": plain.list_node,
    "tree_node": plain.tree_node,
    "is_same_list": same,
    "is_same_tree": same,
}
"""By the name that a test calls them by."""
NAMES: dict[str, Any] = {"inf": math.inf, "nan": math.nan} | {f.__name__: f for f in _BUILTINS}
METHODS = {"split", "join", "lower", "upper", "strip", "startswith", "endswith"}
METHODS |= {"count", "index", "items", "keys", "values", "copy"}
