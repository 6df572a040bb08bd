"""The trusted side of the ground truth: what the tests ask of a solution, and whether the answers are right.

A test is a small program, nearly always the one line `assert Solution().f(n = 7) == 3`. Where it makes one call whose
arguments are known beforehand, that call goes to the untrusted side with all the others in one job, and the test is run
later, over the plain data that came back. Any other test is run while the solution is alive, in a dialogue: every call
is sent when the test makes it. In both cases the expected values never leave this side.
"""

import ast
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from projected_grpo.env import operators, plain, syntax
from projected_grpo.env.interpreter import Ask, Interpreter
from projected_grpo.env.sandbox import Ended
from projected_grpo.env.syntax import UnsupportedTest


class Test:
    """One compiled test: `call` where it makes a single one that is known beforehand, and `holds`."""

    def __init__(self, source: str, names: dict[str, Any]) -> None:
        """`names`: of the setup code. Raises UnsupportedTest for what does not parse or cannot be expressed."""
        try:
            self._body = ast.parse(source.strip()).body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UnsupportedTest(f"does not parse: {error}") from None
        self._names = names
        self.asks = True
        self.call: list | None = None
        """[method, arguments, arguments by name] as wire values."""
        self.expected: tuple[Any] | None = None
        """The value that the call has to return, where the test is that one comparison and nothing else."""
        if (literal := _literal_test(self._body)) is not None:
            self.call, self.expected = literal
            return
        syntax.check(self._body, set(names))
        self.asks = any(map(syntax.mentions_solution, self._body)) or any(
            isinstance(value, ast.FunctionDef) and syntax.mentions_solution(value) for value in names.values()
        )
        if self.asks and (call := _only_call(self._body)) is not None:
            self._plan(call)

    def _plan(self, call: ast.Call) -> None:
        match self._body:
            case [ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]))] if left is call:
                expected: ast.expr | None = right
            case _:
                expected = None
        interpreter = Interpreter(_nobody, self._names)
        assert isinstance(call.func, ast.Attribute)
        try:
            args = [plain.encode(value) for value in interpreter.items(call.args, interpreter.top)]
            named = {str(k.arg): plain.encode(interpreter.evaluate(k.value, interpreter.top)) for k in call.keywords}
            if any(keyword.arg is None for keyword in call.keywords):
                return
            if expected is not None:
                self.expected = (interpreter.evaluate(expected, interpreter.top),)
        except Exception as error:
            raise UnsupportedTest(f"cannot be run: {type(error).__name__}: {error}") from None
        self.call = [call.func.attr, args, named]

    def holds(self, ask: Ask, compare: Callable = operators.compare, numbers: Iterator[int] | None = None) -> bool:
        """Whether every assert holds, given who makes the calls, and the numbers of new instances.

        A result of a shape that the test cannot compute with (`abs("x" - 1)`) fails it: the error is the answer's.
        Raises what `ask` raises to end the run (`Ended`).
        """
        try:
            if self.call is not None and self.expected is not None:
                return compare(ast.Eq(), ask(self.call[0], 0, [], {}), self.expected[0])
            return Interpreter(ask, self._names, compare, numbers or itertools.count()).run(self._body)
        except Ended:
            raise
        except Exception:
            return False


def _nobody(*_call: Any) -> Any:
    raise AssertionError("a call of the solution where none can be")


def _literal_test(body: list[ast.stmt]) -> tuple[list, tuple[Any]] | None:
    """(call, expected) of `assert Solution().f(n = literal) == literal`, the form of nearly all tests, quickly."""
    match body:
        case [
            ast.Assert(
                test=ast.Compare(
                    left=ast.Call(
                        func=ast.Attribute(
                            value=ast.Call(func=ast.Name(id="Solution"), args=[], keywords=[]), attr=method
                        ),
                        args=args,
                        keywords=keywords,
                    ),
                    ops=[ast.Eq()],
                    comparators=[expected],
                )
            )
        ]:
            try:
                given = [plain.encode(ast.literal_eval(arg)) for arg in args]
                named = {str(keyword.arg): plain.encode(ast.literal_eval(keyword.value)) for keyword in keywords}
                wanted = ast.literal_eval(expected)
            except (ValueError, TypeError, RecursionError, MemoryError):
                return None
            if any(keyword.arg is None for keyword in keywords):
                return None
            return [method, given, named], (wanted,)
    return None


def _only_call(body: list[ast.stmt]) -> ast.Call | None:
    """The call in `assert ... Solution().f(known arguments) ...`, made exactly once; None for any other test."""
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        return None
    found, condition = None, body[0].test
    repeated = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for node in ast.walk(condition):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(id="Solution"), args=[], keywords=[]))):
                if found is not None:
                    return None
                found = node
            case ast.BoolOp() | ast.IfExp() if syntax.mentions_solution(node):
                return None  # it may be left out
            case _ if isinstance(node, repeated):
                # Only the first iterable of a comprehension is run once, and in the scope around it.
                inner = [node] if isinstance(node, ast.Lambda) else [node.generators[0].iter]
                mentions = sum(map(syntax.mentions_solution, inner))
                if syntax.mentions_solution(node) and (isinstance(node, ast.Lambda) or not mentions):
                    return None
    names = sum(isinstance(node, ast.Name) and node.id == "Solution" for node in ast.walk(condition))
    if found is None or names != 1:
        return None
    given = [*found.args, *(keyword.value for keyword in found.keywords)]
    used = {node.id for part in given for node in ast.walk(part) if isinstance(node, ast.Name)}
    return found if used <= set(operators.NAMES) else None


class Oracle:
    """All tests of one problem: `calls` go to the untrusted side, `judge` takes what it sent back."""

    def __init__(self, tests: tuple[str, ...], setup_code: str = "") -> None:
        """`setup_code`: the problem's, for functions and constants of it that tests use. Raises UnsupportedTest that
        names the test by its number, from 1."""
        names = _names(setup_code)
        self.tests: list[Test] = []
        for number, source in enumerate(tests, start=1):
            try:
                self.tests.append(Test(source, names))
            except UnsupportedTest as error:
                raise UnsupportedTest(f"test {number} {error}") from None
        self.calls = [test.call for test in self.tests if test.call is not None]
        self.has_dialogue = any(test.asks and test.call is None for test in self.tests)
        self.perfect = self._perfect()
        """The results, byte for byte, that the worker writes for the right answers; None where they may look otherwise.
        Equal bytes are equal values, so that the usual right answer need not be parsed."""

    def _perfect(self) -> bytes | None:
        messages: list[Any] = []
        for number, test in enumerate(self.tests):
            if test.expected is None or not _has_one_spelling(test.expected[0]):
                return None
            messages.append(["done", number, plain.encode(test.expected[0])])
        return b'[["loaded"]]\n' + json.dumps(messages, separators=(",", ":")).encode() + b"\n"

    def judge(self, results: Sequence[Any], compare: Callable = operators.compare) -> int | None:
        """None where every test outside the dialogue holds, else the number (from 1) of the first that does not.

        `results`: one value per call, in order; a missing one means that the untrusted side did not get that far.
        """
        given = iter(results)
        for number, test in enumerate(self.tests, start=1):
            if test.asks and test.call is None:
                continue
            if test.call is None:
                ask: Ask = _nobody
            else:
                try:
                    answer = next(given)
                except StopIteration:
                    return number
                ask = lambda *_call, answer=answer: answer  # noqa: E731
            if not test.holds(ask, compare):
                return number
        return None

    def examine(self, ask: Ask, compare: Callable = operators.compare) -> int | None:
        """The tests of the dialogue, as `judge`. Raises Ended."""
        numbers = itertools.count()
        for number, test in enumerate(self.tests, start=1):
            if test.asks and test.call is None and not test.holds(ask, compare, numbers):
                return number
        return None


def _has_one_spelling(value: Any) -> bool:
    """Whether only one text on the wire stands for values equal to this one that pass; sets and NaN have none."""
    if isinstance(value, list):
        return all(map(_has_one_spelling, value))
    return value is None or type(value) in (bool, int, str)


def _names(setup_code: str) -> dict[str, Any]:
    """Constants of the setup code, and those of its functions that keep to what a test may use."""
    try:
        body = ast.parse(setup_code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found: dict[str, Any] = {}
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    for node in body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                try:
                    found[name] = Interpreter(_nobody).evaluate(value, Interpreter(_nobody).top)
                except Exception:
                    continue  # a test that uses it is refused by this name
            case ast.FunctionDef(name=name) if name not in operators.NAMES:
                try:
                    syntax.check([node], set(found) | set(functions))
                except UnsupportedTest:
                    continue
                found[name] = node
    return found


@functools.lru_cache(maxsize=4096)
def compile_tests(tests: tuple[str, ...], setup_code: str = "") -> Oracle:
    """The oracle of a problem's tests, kept for the next completion. Raises UnsupportedTest."""
    return Oracle(tests, setup_code)
