"""The trusted side of the ground truth: what a test asks of a solution, and whether the answers are right.

A test is a small program: assignments, calls of the solution and asserts, nearly always the one line
`assert Solution().f(n = 7) == 3`. It is read once into the calls that the untrusted side has to make (arguments as
plain data) and replayed later over the plain data that came back. The interpreter below knows plain values and what
`operators.py` computes with them. It executes neither the completion's code nor the data set's.

Left out on purpose: calls whose arguments depend on earlier results, calls of the solution inside a comprehension,
helpers of a setup code other than list_node, tree_node, is_same_list and is_same_tree. Such a test is refused when it
is loaded, never passed or failed in silence.
"""

import ast
import functools
import json
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from projected_grpo.env import operators, plain


class UnsupportedTest(ValueError):
    """A test that cannot be judged from plain data; the message says which part of it."""


class _Unknown:
    """Stands for a result that is not there yet, while the calls are planned."""

    def __repr__(self) -> str:
        return "an earlier result"


_UNKNOWN = _Unknown()


@dataclass(frozen=True)
class Call:
    """One call of the solution: which method, on which instance (None: a fresh one), with what, as wire values."""

    method: str
    instance: int | None
    args: tuple
    kwargs: tuple[tuple[str, Any], ...]
    watched: tuple[int | str, ...]
    """Arguments (position or name) that are variables of the test: their state after the call comes back with it."""

    def wire(self) -> list:
        return [self.method, self.instance, list(self.args), dict(self.kwargs), list(self.watched)]


class Test:
    """One compiled test: `calls` for the untrusted side, `holds(results)` for the trusted one."""

    def __init__(self, source: str) -> None:
        """Raises UnsupportedTest for a test that does not parse or cannot be expressed."""
        try:
            self._body = ast.parse(source.strip()).body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UnsupportedTest(f"does not parse: {error}") from None
        self._index: dict[int, int] = {}
        self.calls: list[Call] = []
        try:
            _Interpreter(self, None).run()
        except UnsupportedTest:
            raise
        except Exception as error:
            raise UnsupportedTest(f"cannot be planned: {error}") from None

    def holds(self, results: list[tuple[Any, list]]) -> bool:
        """Whether every assert holds for `results`, one (returned value, watched arguments afterwards) per call.

        A result of a shape that the test cannot compute with (`abs("x" - 1)`) fails it: the error is the answer's.
        """
        try:
            return _Interpreter(self, results).run()
        except Exception:
            return False


class _Interpreter:
    """Runs a test's statements; without results it plans (records calls), with them it judges."""

    def __init__(self, test: Test, results: list[tuple[Any, list]] | None) -> None:
        self.test, self.results, self.planning = test, results, results is None
        self.variables: dict[str, Any] = {}
        self.instances = 0

    def run(self) -> bool:
        return all(self.statement(node) or self.planning for node in self.test._body)

    def statement(self, node: ast.stmt) -> bool:
        match node:
            case ast.Assert(test=condition):
                held = self.evaluate(condition)
                return True if held is _UNKNOWN else bool(held)
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                self.variables[name] = self.instance(value) or self.evaluate(value)
            case ast.Assign(targets=[ast.Tuple(elts=elements)], value=value) if all(
                isinstance(e, ast.Name) for e in elements
            ):
                values = self.evaluate(value)
                parts = [_UNKNOWN] * len(elements) if values is _UNKNOWN else list(values)
                self.variables.update(zip((e.id for e in elements), parts, strict=True))
            case ast.Expr(value=value):
                self.evaluate(value)
            case ast.Pass():
                pass
            case _:
                raise UnsupportedTest(f"uses the statement `{ast.unparse(node)[:60]}`")
        return True

    def instance(self, node: ast.expr) -> "_Instance | None":
        match node:
            case ast.Call(func=ast.Name(id="Solution"), args=[], keywords=[]):
                self.instances += 1
                return _Instance(self.instances - 1)
        return None

    def evaluate(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.List(elts=elements):
                return self.sequence(elements, list)
            case ast.Tuple(elts=elements):
                return self.sequence(elements, tuple)
            case ast.Set(elts=elements):
                return self.sequence(elements, operators.build_set)
            case ast.Dict(keys=keys, values=values) if None not in keys:
                pairs = self.sequence([*keys, *values], list)
                return pairs if pairs is _UNKNOWN else dict(zip(pairs[: len(keys)], pairs[len(keys) :], strict=True))
            case ast.Name(id=name):
                return self.name(name)
            case ast.UnaryOp(op=op, operand=operand):
                return self.apply(functools.partial(operators.unary, type(op)), [self.evaluate(operand)])
            case ast.BinOp(left=left, op=op, right=right) if type(op) in operators.BINARY:
                return self.apply(
                    functools.partial(operators.binary, type(op)), [self.evaluate(left), self.evaluate(right)]
                )
            case ast.BoolOp(op=op, values=values):
                return self.boolean(isinstance(op, ast.And), values)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                values = [self.evaluate(side) for side in (left, *comparators)]
                return self.apply(lambda *v: all(map(operators.compare, ops, v, v[1:])), values)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                if self.planning:
                    values = [self.evaluate(part) for part in (test, body, orelse)]
                    return self.apply(lambda condition, yes, no: yes if condition else no, values)
                return self.evaluate(body if self.evaluate(test) else orelse)
            case ast.Subscript(value=value, slice=index):
                return self.apply(operator.getitem, [self.evaluate(value), self.index(index)])
            case ast.ListComp() | ast.GeneratorExp() | ast.SetComp() | ast.Lambda():
                return self.closure(node)
            case ast.Call():
                return self.call(node)
        raise UnsupportedTest(f"uses the expression `{ast.unparse(node)[:60]}`")

    def apply(self, function: Callable, values: list) -> Any:
        return _UNKNOWN if any(value is _UNKNOWN for value in values) else function(*values)

    def sequence(self, elements: list[ast.expr], build: Callable) -> Any:
        return self.apply(lambda *values: build(values), [self.evaluate(element) for element in elements])

    def name(self, name: str) -> Any:
        for scope in (self.variables, operators.NAMES):
            if name in scope:
                return scope[name]
        raise UnsupportedTest(f"uses the name `{name}`")

    def index(self, node: ast.expr) -> Any:
        if not isinstance(node, ast.Slice):
            return self.evaluate(node)
        bounds = [None if part is None else self.evaluate(part) for part in (node.lower, node.upper, node.step)]
        return self.apply(slice, bounds)

    def boolean(self, is_and: bool, operands: list[ast.expr]) -> Any:
        if self.planning:  # every operand is visited, to find the calls behind a short circuit
            values = [self.evaluate(operand) for operand in operands]
            if any(value is _UNKNOWN for value in values):
                return _UNKNOWN
        for operand in operands[:-1]:
            value = self.evaluate(operand)
            if bool(value) is not is_and:
                return value
        return self.evaluate(operands[-1])

    def closure(self, node: ast.expr) -> Any:
        """A comprehension or a lambda over plain values, none of which may call the solution."""
        repeated = [node.body] if isinstance(node, ast.Lambda) else [node.elt, *node.generators[0].ifs]
        names = {part.id for root in repeated for part in ast.walk(root) if isinstance(part, ast.Name)}
        if "Solution" in names or any(isinstance(self.variables.get(name), _Instance) for name in names):
            raise UnsupportedTest("calls the solution inside a comprehension")
        if any(self.variables.get(name) is _UNKNOWN for name in names):
            return _UNKNOWN
        if isinstance(node, ast.Lambda):
            parameters = [argument.arg for argument in node.args.args]
            return lambda *values: self.scoped(dict(zip(parameters, values, strict=True)), node.body)
        if len(node.generators) != 1 or not isinstance(node.generators[0].target, ast.Name):
            raise UnsupportedTest(f"uses the expression `{ast.unparse(node)[:60]}`")
        loop = node.generators[0]
        items = self.evaluate(loop.iter)
        if items is _UNKNOWN:
            return _UNKNOWN
        bind = [{loop.target.id: item} for item in items]
        kept = [scope for scope in bind if all(self.scoped(scope, condition) for condition in loop.ifs)]
        values = [self.scoped(scope, node.elt) for scope in kept]
        return operators.build_set(values) if isinstance(node, ast.SetComp) else values

    def scoped(self, scope: dict[str, Any], node: ast.expr) -> Any:
        outer = self.variables
        self.variables = outer | scope
        try:
            return self.evaluate(node)
        finally:
            self.variables = outer

    def call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if self.instance(owner):
                return self.solution(node, node.func.attr, None)
            if isinstance(owner, ast.Name) and isinstance(self.variables.get(owner.id), _Instance):
                return self.solution(node, node.func.attr, self.variables[owner.id].number)
        elif isinstance(node.func, ast.Name) and isinstance(self.variables.get(node.func.id), _Instance):
            raise UnsupportedTest("calls an instance of Solution")
        arguments = [self.evaluate(argument) for argument in node.args]
        keywords = [self.evaluate(keyword.value) for keyword in node.keywords]
        names = [keyword.arg for keyword in node.keywords]
        if isinstance(node.func, ast.Attribute) and node.func.attr in operators.METHODS:
            arguments.insert(0, self.evaluate(node.func.value))
            function = functools.partial(operators.call_method, node.func.attr)
        elif ast.unparse(node.func) in operators.FUNCTIONS:
            function = operators.FUNCTIONS[ast.unparse(node.func)]
        else:
            raise UnsupportedTest(f"calls `{ast.unparse(node.func)[:60]}`")
        count = len(arguments)
        return self.apply(
            lambda *values: function(*values[:count], **dict(zip(names, values[count:], strict=True))),
            arguments + keywords,
        )

    def solution(self, node: ast.Call, method: str, instance: int | None) -> Any:
        keyed = [*enumerate(node.args), *((keyword.arg, keyword.value) for keyword in node.keywords)]
        watched = {
            key: argument.id
            for key, argument in keyed
            if isinstance(argument, ast.Name) and argument.id in self.variables
        }
        if self.results is None:
            self.plan(node, method, instance, tuple(watched))
            answer, after = _UNKNOWN, [_UNKNOWN] * len(watched)
        else:
            answer, after = self.results[self.test._index[id(node)]]
        self.variables.update(zip(watched.values(), after, strict=True))
        return answer

    def plan(self, node: ast.Call, method: str, instance: int | None, watched: tuple[int | str, ...]) -> None:
        values = [self.evaluate(argument) for argument in node.args]
        keywords = [(keyword.arg, self.evaluate(keyword.value)) for keyword in node.keywords]
        for value in (*values, *(value for _, value in keywords)):
            if value is _UNKNOWN:
                raise UnsupportedTest("passes an earlier result back to the solution")
        if any(name is None for name, _ in keywords):
            raise UnsupportedTest("passes ** arguments")
        self.test._index[id(node)] = len(self.test.calls)
        encoded = tuple((name, plain.encode(value)) for name, value in keywords)
        self.test.calls.append(Call(method, instance, tuple(map(plain.encode, values)), encoded, watched))


@dataclass(frozen=True)
class _Instance:
    """A variable of the test that holds `Solution()`; the untrusted side keeps the object."""

    number: int


class Oracle:
    """All tests of one problem: `wire` goes to the untrusted side, `judge` takes what it sent back."""

    def __init__(self, tests: tuple[str, ...]) -> None:
        """Raises UnsupportedTest that names the test by its number, from 1."""
        self.tests: list[Test] = []
        for number, source in enumerate(tests, start=1):
            try:
                self.tests.append(Test(source))
            except UnsupportedTest as error:
                raise UnsupportedTest(f"test {number} {error}") from None
        self.calls = [(index, call) for index, test in enumerate(self.tests) for call in test.calls]
        self.wire = json.dumps([[index, *call.wire()] for index, call in self.calls], separators=(",", ":"))

    def judge(self, results: list[tuple[Any, list]]) -> int | None:
        """None where every test holds, else the number (from 1) of the first that does not.

        `results`: one (value, watched arguments afterwards) per call, in order; a missing tail means that the
        untrusted side did not get that far.
        """
        start = 0
        for number, test in enumerate(self.tests, start=1):
            end = start + len(test.calls)
            if end > len(results) or not test.holds(results[start:end]):
                return number
            start = end
        return None


@functools.lru_cache(maxsize=4096)
def compile_tests(tests: tuple[str, ...]) -> Oracle:
    """The oracle of a problem's tests, kept for the next completion. Raises UnsupportedTest."""
    return Oracle(tests)
