"""Runs a test: a small part of Python over plain values, in which calls of the solution are asked of somebody else.

What a test computes with is in `operators.py`, what it may use in `syntax.py`. Neither the completion's code nor the
data set's is executed here: `ask` brings back what the solution returned, as plain data, and what it made of its
arguments, which are changed in place, so that every other name of theirs sees it.
"""

import ast
import copy
import functools
import itertools
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from projected_grpo.env import operators
from projected_grpo.env.syntax import UnsupportedTest

MAX_STEPS = 300_000
"""Statements and expressions of one test; beyond that it does not hold, however a result makes a checker loop."""

MAX_SECONDS = 5.0
"""CPU time of one test on this side; likewise."""

Ask = Callable[[str, int, list, dict[str, Any]], Any]
"""(method, number of the instance, arguments, keyword arguments) -> what it returned."""


@dataclass(frozen=True)
class Instance:
    """An object of class Solution, which the untrusted side keeps under this number."""

    number: int


class _Method:
    """A method of the solution, to be called; it is no value that a test could judge."""

    def __init__(self, ask: Ask, name: str, instance: int) -> None:
        self.ask, self.name, self.instance = ask, name, instance

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.ask(self.name, self.instance, list(args), keywords)

    def __bool__(self) -> bool:
        raise TypeError(f"{self.name} is asked for its truth and not called")


class _Scope:
    """Names of one function call, comprehension or test, and the scope around it."""

    def __init__(self, outer: "_Scope | None" = None, names: Mapping[str, Any] | None = None) -> None:
        self.outer, self.names = outer, dict(names or {})

    def find(self, name: str) -> Any:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.outer
        if name in operators.NAMES:
            return operators.NAMES[name]
        raise NameError(name)


class _Fails(Exception):
    """An assert that does not hold."""


class _Return(Exception):
    """Ends a function of the test."""


class _Leave(Exception):
    """`break`, or (`.again`) `continue`."""

    def __init__(self, again: bool) -> None:
        self.again = again


@dataclass
class Interpreter:
    """One run of one test."""

    ask: Ask
    globals: Mapping[str, Any] = field(default_factory=dict)
    """Constants of the setup code, and its functions as syntax trees."""
    compare: Callable[[ast.cmpop, Any, Any], bool] = operators.compare
    numbers: Iterator[int] = field(default_factory=itertools.count)
    """Of the instances that it makes; shared by the tests of one dialogue."""
    steps: int = 0

    def __post_init__(self) -> None:
        self.began = time.thread_time()
        self.top = _Scope()
        for name, value in self.globals.items():
            is_function = isinstance(value, ast.FunctionDef)
            made = self.function(value.args, value.body, self.top) if is_function else copy.deepcopy(value)
            self.top.names[name] = made

    def run(self, body: list[ast.stmt]) -> bool:
        """Whether every assert holds. Raises what the test itself raises, TypeError for data that is not plain."""
        try:
            self.block(body, _Scope(self.top))
        except _Fails:
            return False
        return True

    def count(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise OverflowError(f"takes more than {MAX_STEPS} steps")
        if self.steps % 64 == 0 and time.thread_time() - self.began > MAX_SECONDS:
            raise OverflowError(f"takes more than {MAX_SECONDS} s")

    # --- statements --------------------------------------------------------------------------------------------------

    def block(self, body: Sequence[ast.stmt], scope: _Scope) -> None:
        for node in body:
            self.statement(node, scope)

    def statement(self, node: ast.stmt, scope: _Scope) -> None:
        self.count()
        match node:
            case ast.Assert(test=condition):
                if not self.evaluate(condition, scope):
                    raise _Fails
            case ast.Assign(targets=targets, value=value):
                made = self.evaluate(value, scope)
                for target in targets:
                    self.bind(target, made, scope)
            case ast.AnnAssign(target=target, value=value):
                if value is not None:
                    self.bind(target, self.evaluate(value, scope), scope)
            case ast.AugAssign(target=target, op=op, value=value):
                left, right = self.evaluate(target, scope), self.evaluate(value, scope)
                if isinstance(left, list) and isinstance(op, ast.Add):
                    left.extend(right)  # in place: other names of the list see it
                    made = left
                else:
                    made = operators.binary(type(op), left, right)
                self.bind(target, made, scope)
            case ast.Expr(value=value):
                self.evaluate(value, scope)
            case ast.If(test=test, body=body, orelse=orelse):
                self.block(body if self.evaluate(test, scope) else orelse, scope)
            case ast.For(target=target, iter=iterable, body=body):
                self.loop(self.turns(target, self.evaluate(iterable, scope), scope), body, scope)
            case ast.While(test=test, body=body):
                self.loop(iter(lambda: bool(self.evaluate(test, scope)), False), body, scope)
            case ast.FunctionDef(name=name, args=args, body=body):
                scope.names[name] = self.function(args, body, scope)
            case ast.Return(value=value):
                raise _Return(None if value is None else self.evaluate(value, scope))
            case ast.Break() | ast.Continue():
                raise _Leave(isinstance(node, ast.Continue))
            case ast.ImportFrom(module=module, names=names):
                scope.names |= {name.name: operators.FUNCTIONS[f"{module}.{name.name}"] for name in names}
            case ast.Import() | ast.Pass():
                pass
            case _:
                raise UnsupportedTest(f"uses the statement `{ast.unparse(node)[:60]}`")

    def turns(self, target: ast.expr, items: Iterable, scope: _Scope) -> Iterator[None]:
        for item in items:
            self.bind(target, item, scope)
            yield

    def loop(self, turns: Iterator[Any], body: Sequence[ast.stmt], scope: _Scope) -> None:
        for _ in turns:
            self.count()
            try:
                self.block(body, scope)
            except _Leave as leave:
                if not leave.again:
                    return

    def bind(self, target: ast.expr, value: Any, scope: _Scope) -> None:
        match target:
            case ast.Name(id=name):
                scope.names[name] = value
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                self.unpack(elements, list(value), scope)
            case ast.Subscript(value=owner, slice=index):
                operator.setitem(self.evaluate(owner, scope), self.index_of(index, scope), value)
            case _:
                raise UnsupportedTest(f"assigns to `{ast.unparse(target)[:60]}`")

    def unpack(self, targets: Sequence[ast.expr], values: list, scope: _Scope) -> None:
        starred = [i for i, target in enumerate(targets) if isinstance(target, ast.Starred)]
        if starred:
            (at,) = starred
            after = len(targets) - at - 1
            if len(values) < at + after:
                raise ValueError("not enough values to unpack")
            end = len(values) - after
            values = [*values[:at], values[at:end], *values[end:]]
            targets = [target.value if isinstance(target, ast.Starred) else target for target in targets]
        for part, item in zip(targets, values, strict=True):
            self.bind(part, item, scope)

    # --- expressions -------------------------------------------------------------------------------------------------

    def evaluate(self, node: ast.expr, scope: _Scope) -> Any:
        self.count()
        match node:
            case ast.Constant(value=value):
                return value
            case ast.List(elts=elements):
                return self.items(elements, scope)
            case ast.Tuple(elts=elements):
                return tuple(self.items(elements, scope))
            case ast.Set(elts=elements):
                return operators.build_set(self.items(elements, scope))
            case ast.Dict(keys=keys, values=values):
                return self.mapping(keys, values, scope)
            case ast.Name(id=name):
                return scope.find(name)
            case ast.UnaryOp(op=op, operand=operand):
                return operators.unary(type(op), self.evaluate(operand, scope))
            case ast.BinOp(left=left, op=op, right=right):
                return operators.binary(type(op), self.evaluate(left, scope), self.evaluate(right, scope))
            case ast.BoolOp(op=op, values=values):
                for operand in values[:-1]:
                    value = self.evaluate(operand, scope)
                    if bool(value) is not isinstance(op, ast.And):
                        return value
                return self.evaluate(values[-1], scope)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                value = self.evaluate(left, scope)
                for comparison, side in zip(ops, comparators, strict=True):
                    before, value = value, self.evaluate(side, scope)
                    if not self.compare(comparison, before, value):
                        return False
                return True
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self.evaluate(body if self.evaluate(test, scope) else orelse, scope)
            case ast.Subscript(value=value, slice=index):
                return operator.getitem(self.evaluate(value, scope), self.index_of(index, scope))
            case ast.Lambda(args=args, body=body):
                return self.function(args, [ast.Return(body)], scope)
            case ast.ListComp(elt=element, generators=generators):
                return [self.evaluate(element, inner) for inner in self.scopes(generators, scope)]
            case ast.SetComp(elt=element, generators=generators):
                return operators.build_set(self.evaluate(element, inner) for inner in self.scopes(generators, scope))
            case ast.DictComp(key=key, value=value, generators=generators):
                inners = self.scopes(generators, scope)
                return operators.build_dict((self.evaluate(key, i), self.evaluate(value, i)) for i in inners)
            case ast.GeneratorExp(elt=element, generators=generators):
                return (self.evaluate(element, inner) for inner in self.scopes(generators, scope))
            case ast.JoinedStr(values=parts):
                return "".join(self.formatted(part, scope) for part in parts)
            case ast.Attribute(value=value, attr=attr):
                return self.attribute(value, attr, scope)
            case ast.Call(func=ast.Name(id="Solution")):
                return Instance(next(self.numbers))
            case ast.Call(func=function, args=args, keywords=keywords):
                called = self.evaluate(function, scope)
                given = self.items(args, scope)
                named: dict[str, Any] = {}
                for keyword in keywords:
                    value = self.evaluate(keyword.value, scope)
                    named |= value if keyword.arg is None else {keyword.arg: value}
                return called(*given, **named)
        raise UnsupportedTest(f"uses the expression `{ast.unparse(node)[:60]}`")

    def items(self, elements: Sequence[ast.expr], scope: _Scope) -> list:
        found = []
        for element in elements:
            if isinstance(element, ast.Starred):
                found += list(self.evaluate(element.value, scope))
            else:
                found.append(self.evaluate(element, scope))
        return found

    def mapping(self, keys: Sequence[ast.expr | None], values: Sequence[ast.expr], scope: _Scope) -> dict:
        pairs: list[tuple[Any, Any]] = []
        for key, value in zip(keys, values, strict=True):
            made = self.evaluate(value, scope)
            pairs += made.items() if key is None else [(self.evaluate(key, scope), made)]
        return operators.build_dict(pairs)

    def index_of(self, node: ast.expr, scope: _Scope) -> Any:
        if not isinstance(node, ast.Slice):
            return self.evaluate(node, scope)
        bounds = (node.lower, node.upper, node.step)
        return slice(*(None if part is None else self.evaluate(part, scope) for part in bounds))

    def formatted(self, part: ast.expr, scope: _Scope) -> str:
        if isinstance(part, ast.Constant):
            return str(part.value)
        assert isinstance(part, ast.FormattedValue)
        value = self.evaluate(part.value, scope)
        return repr(operators.NAMES["str"](value)) if part.conversion == ord("r") else operators.NAMES["str"](value)

    def scopes(self, generators: Sequence[ast.comprehension], scope: _Scope) -> Iterator[_Scope]:
        """A scope for each turn of a comprehension, made when it is asked for, so that `any` stops where it stops."""
        if not generators:
            yield scope
            return
        first, *rest = generators
        for item in self.evaluate(first.iter, scope):
            inner = _Scope(scope)
            self.bind(first.target, item, inner)
            if all(self.evaluate(condition, inner) for condition in first.ifs):
                yield from self.scopes(rest, inner)

    def function(self, parameters: ast.arguments, body: Sequence[ast.stmt], scope: _Scope) -> Callable:
        """A lambda or a function of the test, as a callable."""
        names = [argument.arg for argument in parameters.args]
        defaults = [self.evaluate(default, scope) for default in parameters.defaults]
        given = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))

        def called(*values: Any, **keywords: Any) -> Any:
            bound = given | dict(zip(names, values, strict=False)) | keywords
            if len(values) > len(names) or bound.keys() != set(names):
                raise TypeError(f"takes {', '.join(names)}")
            try:
                self.block(body, _Scope(scope, bound))
            except _Return as ended:
                return ended.args[0]
            return None

        return called

    def attribute(self, owner: ast.expr, name: str, scope: _Scope) -> Callable:
        if isinstance(owner, ast.Name) and (path := f"{owner.id}.{name}") in operators.FUNCTIONS:
            return operators.FUNCTIONS[path]
        value = self.evaluate(owner, scope)
        if isinstance(value, Instance):
            return _Method(self.ask, name, value.number)
        return functools.partial(operators.call_method, name, value)
