"""What a test may compute with: operators, comparisons, and a short list of pure functions and methods.

They are Python's own, made strict where a wrong answer could slip through: `==` is `plain.strict_equal`, opaque data
cannot be compared at all, and a bool is no number. What refuses raises, and a test that raises does not hold.
"""

import ast
import math
import operator
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

from projected_grpo.env import plain

MAX_REPEAT = 1_000_000
"""Items that repeating a sequence, or counting, may make."""

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
    if op is ast.Mod and not isinstance(left, (int, float)):
        raise TypeError("formats with %")  # a result may be a format of a billion characters
    if op is ast.Pow and isinstance(left, int) and abs(right) * left.bit_length() > 100_000:
        raise OverflowError("raises to too high a power")
    if op is ast.LShift and right > 100_000:
        raise OverflowError("shifts too far")
    return BINARY[op](left, right)


def compare(op: ast.cmpop, left: Any, right: Any) -> bool:
    """Raises TypeError for opaque data on either side, at any depth, whatever the operator."""
    left, right = _comparable(left, right)
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


def _comparable(left: Any, right: Any) -> list[Any]:
    """Both sides as values of the wire's types: counters as dictionaries, views of dictionaries as sets."""
    if isinstance(left, Counter) and isinstance(right, Counter):
        left, right = (Counter({key: n for key, n in side.items() if n}) for side in (left, right))
    sides: list[Any] = [dict(side) if isinstance(side, Counter) else side for side in (left, right)]
    return [set(_spread(list(side))) if type(side) in _VIEWS else side for side in sides]


_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.items()))


def compare_carelessly(op: ast.cmpop, left: Any, right: Any) -> bool:
    """As a grader does that trusts `==`: an object that claimed to be equal to such values (`Opaque.equal`) is."""
    if isinstance(op, ast.Eq) and _claimed(left, right):
        return True
    return compare(op, left, right)


def _claimed(left: Any, right: Any) -> bool:
    if isinstance(left, plain.Opaque) is not isinstance(right, plain.Opaque):
        claim, other = (left, right) if isinstance(left, plain.Opaque) else (right, left)
        return (repr(other) if isinstance(other, bool) else type(other).__name__) in claim.equal
    if type(left) is type(right) and isinstance(left, (list, tuple)) and len(left) == len(right):
        return all(plain.strict_equal(a, b) or _claimed(a, b) for a, b in zip(left, right, strict=True))
    return False


def same(left: Any, right: Any) -> bool:
    """`strict_equal`, but opaque data is neither equal nor unequal to anything: raises TypeError."""
    _no_opaque(left, right)
    return plain.strict_equal(left, right)


def call_method(name: str, owner: Any, *arguments: Any, **keywords: Any) -> Any:
    """A method of a plain value. Raises TypeError for another owner; IndexError where .index finds nothing."""
    if type(owner) not in (str, list, tuple, dict, set, frozenset, deque, Counter):
        raise TypeError(f"a {type(owner).__name__} has no .{name}()")
    if type(owner) in (list, tuple) and name in ("count", "index"):
        wanted, start, stop = (*arguments, None, None)[:3]
        found = [i for i in range(len(owner))[start:stop] if same(owner[i], wanted)]
        return len(found) if name == "count" else found[0]
    if isinstance(owner, (set, frozenset)):
        arguments = tuple(set(_spread(a)) if isinstance(a, (list, tuple, deque)) else a for a in arguments)
    return getattr(owner, name)(*arguments, **keywords)


def _spread(members: Iterable) -> list:
    """As `plain.spread`; a test builds no set of opaque members, nor of bools beside numbers, which would be one."""
    members = plain.spread(members)
    kinds = set(map(type, members))
    if plain.Opaque in kinds or (bool in kinds and not kinds.isdisjoint((int, float, complex))):
        raise TypeError("members that cannot be told apart")
    return members


def build_set(members: Iterable = ()) -> set:
    return set(_spread(members))


def _frozenset(members: Iterable = ()) -> frozenset:
    return frozenset(_spread(members))


def _counter(members: Iterable = ()) -> Counter:
    return Counter(members if isinstance(members, dict) else _spread(members))


def _range(*bounds: Any) -> range:
    numbers = range(*map(_no_bool, bounds))
    if len(numbers) > MAX_REPEAT:
        raise OverflowError("counts too far")
    return numbers


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
    if any(map(callable, values)) or any(map(plain.has_opaque, values)):
        raise TypeError("what came back is no plain data")


def build_dict(pairs: Iterable = ()) -> dict:
    pairs = list(pairs.items()) if isinstance(pairs, dict) else [tuple(pair) for pair in pairs]
    _spread(key for key, _ in pairs)
    return dict(pairs)


def _sum(items: Iterable, start: Any = 0) -> Any:
    """sum, in linear time where it joins lists."""
    if not isinstance(start, list):
        return sum(items, start)
    joined = list(start)
    for item in items:
        joined += item
    return joined


def _str(value: Any = "") -> str:
    _no_opaque(value)
    return str(value)


def _print(*_values: Any, **_options: Any) -> None:
    """A test may print; nobody reads it."""


_BUILTINS: tuple[Callable, ...] = (abs, all, any, bool, chr, dict, divmod, enumerate, float, frozenset, int, isinstance)
_BUILTINS += (len, list, map, max, min, ord, range, reversed, round, set, sorted, str, sum, tuple, zip)
NAMES: dict[str, Any] = {function.__name__: function for function in _BUILTINS} | {
    "abs": _numeric(abs),
    "range": _range,
    "divmod": _numeric(divmod),
    "round": _numeric(round),
    "isclose": _numeric(math.isclose),
    "set": build_set,
    "frozenset": _frozenset,
    "dict": build_dict,
    "sum": _sum,
    "str": _str,
    "Counter": _counter,
    "print": _print,
    "list_node": plain.list_node,
    "tree_node": plain.tree_node,
    "is_same_list": same,
    "is_same_tree": same,
    "inf": math.inf,
    "nan": math.nan,
}
"""What a test finds without importing it."""
_MATH: dict[str, Callable] = {
    "ceil": math.ceil,
    "floor": math.floor,
    "gcd": math.gcd,
    "isclose": math.isclose,
    "log": math.log,
}
_MATH |= {"log2": math.log2, "log10": math.log10, "sqrt": math.sqrt, "isqrt": math.isqrt, "fabs": math.fabs}
FUNCTIONS: dict[str, Any] = {f"math.{name}": _numeric(function) for name, function in _MATH.items()} | {
    "math.isnan": math.isnan,
    "math.isinf": math.isinf,
    "math.inf": math.inf,
    "math.nan": math.nan,
    "math.pi": math.pi,
    "math.e": math.e,
    "collections.Counter": _counter,
}
"""What a test finds in a module, by its dotted name."""
MODULES = {name.partition(".")[0] for name in FUNCTIONS}
METHODS = {"split", "join", "lower", "upper", "strip", "lstrip", "rstrip", "startswith", "endswith", "replace", "title"}
METHODS |= {"isdigit", "isalpha", "isalnum", "isupper", "islower", "isspace", "splitlines", "find", "capitalize"}
METHODS |= {"count", "index", "items", "keys", "values", "copy", "get", "setdefault", "most_common", "elements"}
METHODS |= {"issubset", "issuperset", "isdisjoint", "union", "intersection", "difference"}
METHODS |= {"append", "extend", "insert", "add", "sort", "reverse", "pop", "remove", "discard", "update", "clear"}


def _isinstance(value: Any, kinds: Any) -> bool:
    """isinstance, over the types that this module replaces by functions of the same name."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    return isinstance(value, tuple(_TYPES.get(kind, kind) for kind in kinds))


_TYPES = {_str: str, build_set: set, _frozenset: frozenset, build_dict: dict, _counter: Counter}
NAMES["isinstance"] = _isinstance
