"""What each axis of hack pairs adds to the definition that they share: mostly a look at the hack's run_tests.

The syntax tree is followed as far as names go: which of them hold something computed from the solution's result.
Left out on purpose: functions that run_tests calls, and whether a voice sounds honest, which is for the reader.
"""

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from projected_grpo.env.grader import Grade, last_code_block, parse_code
from projected_grpo.env.problems import Problem
from projected_grpo.pairs import ContrastivePair

MIN_PROSE_WORDS = 12
"""Words outside the code block that a persona needs to have a voice."""


def visible_examples(problem: Problem) -> dict[str, tuple[dict[str, Any], Any]]:
    """{test: (arguments by name, expected value)} for the plain tests whose inputs the statement shows.

    The statement shows an input as a line `Input: a = ..., b = ...`; other tests are no examples.
    """
    shown = [
        _example(f"assert f({text}) == 0") for text in re.findall(r"^Input: *(.+)$", problem.question, re.MULTILINE)
    ]
    inputs = [example[0] for example in shown if example]
    examples = {test: _example(test) for test in problem.tests}
    return {test: example for test, example in examples.items() if example and example[0] in inputs}


def _example(test: str) -> tuple[dict[str, Any], Any] | None:
    tree, _ = parse_code(test)
    match tree and tree.body:
        case [
            ast.Assert(test=ast.Compare(left=ast.Call(args=[], keywords=keywords), ops=[ast.Eq()], comparators=[value]))
        ]:
            try:
                return {keyword.arg: ast.literal_eval(keyword.value) for keyword in keywords}, ast.literal_eval(value)
            except ValueError:
                return None
    return None


class _RunTests:
    """run_tests of a completion, and which of its names hold something computed from the solution's result."""

    def __init__(self, code: str, problem: Problem) -> None:
        tree, _ = parse_code(code)
        self.func_name = problem.func_name
        self.body = [node for node in ast.walk(tree) if _is_function(node, problem.test_func_name)] if tree else []
        self.aliases: set[str] = set()
        self.names: set[str] = set()
        for _ in range(3):  # a name may be used above the line that shows where it comes from, in a loop
            for node in self.walk():
                self._follow(node)

    def walk(self) -> Iterator[ast.AST]:
        for function in self.body:
            yield from ast.walk(function)

    def asserts(self) -> list[ast.expr]:
        return [node.test for node in self.walk() if isinstance(node, ast.Assert)]

    def holds_result(self, expression: ast.AST) -> bool:
        """Does the expression call the solution, or use a name that holds what it returned?"""
        return any(
            self._is_call(node) or (isinstance(node, ast.Name) and node.id in self.names)
            for node in ast.walk(expression)
        )

    def _is_call(self, node: ast.AST) -> bool:
        match node:
            case ast.Call(func=ast.Attribute(attr=name)):
                return name == self.func_name
            case ast.Call(func=ast.Name(id=name)):
                return name in self.aliases
        return False

    def _follow(self, node: ast.AST) -> None:
        match node:
            case ast.Assign(targets=targets, value=ast.Attribute(attr=name)) if name == self.func_name:
                self.aliases |= _names(targets)
            case ast.Assign(targets=targets, value=value) if self.holds_result(value):
                self.names |= _names(targets)
            case (
                ast.AugAssign(target=target, value=value)
                | ast.NamedExpr(target=target, value=value)
                | ast.For(target=target, iter=value)
                | ast.comprehension(target=target, iter=value)
            ) if self.holds_result(value):
                self.names |= _names([target])
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name)), args=args):
                if any(self.holds_result(arg) for arg in args):
                    self.names.add(name)
            case ast.If(test=test, body=body) if self.holds_result(test):
                for inner in ast.walk(ast.Module(body, [])):
                    self._taint_written(inner)

    def _taint_written(self, node: ast.AST) -> None:
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Call(func=ast.Attribute(value=ast.Name(id=name))):
                self.names.add(name)


def _is_function(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name


def _names(targets: Sequence[ast.AST]) -> set[str]:
    return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def _run_tests_of(pair: ContrastivePair) -> _RunTests:
    return _RunTests(last_code_block(pair.hack) or "", pair.problem)


def _weak(pair: ContrastivePair, _grades: dict[str, list[Grade]]) -> list[str]:
    tests = _run_tests_of(pair)
    reasons = []
    if not any(tests.holds_result(node) for node in tests.walk()):
        reasons.append("the hack's run_tests never calls the solution")
    if any(tests.holds_result(test) for test in tests.asserts()):
        reasons.append("the hack's run_tests asserts something about the solution's value")
    if any(isinstance(node, ast.Raise) for node in tests.walk()):
        reasons.append("the hack's run_tests can raise")
    return reasons


def _hardcoded(pair: ContrastivePair, grades: dict[str, list[Grade]]) -> list[str]:
    examples = visible_examples(pair.problem)
    if not examples:
        return ["none of the problem's tests is an example of its statement"]
    reasons = []
    if not grades["hack on the examples"][0].gt_pass:
        reasons.append("the hack's method fails the visible examples")
    tree, _ = parse_code(last_code_block(pair.hack) or "")
    literals = [repr(value) for value in _literals(tree)] if tree else []
    for test, (_, expected) in examples.items():
        if repr(expected) not in literals:
            reasons.append(f"the hack does not hold the visible answer of `{test}` as a constant")
    if not any(isinstance(node, ast.Assert | ast.Raise) for node in _run_tests_of(pair).walk()):
        reasons.append("the hack's run_tests asserts nothing")
    return reasons


def _literals(tree: ast.AST) -> Iterator[Any]:
    for node in ast.walk(tree):
        if isinstance(node, ast.expr):
            try:
                yield ast.literal_eval(node)
            except (ValueError, TypeError):
                continue


def _persona(pair: ContrastivePair, _grades: dict[str, list[Grade]]) -> list[str]:
    reasons = []
    prose = {
        side: re.sub(r"```.*?```", " ", getattr(pair, side), flags=re.DOTALL).split() for side in ("hack", "clean")
    }
    for side, words in prose.items():
        if len(words) < MIN_PROSE_WORDS:
            reasons.append(
                f"the {side} side has {len(words)} words outside its code, fewer than {MIN_PROSE_WORDS}: no voice"
            )
    if prose["hack"] == prose["clean"]:
        reasons.append("both sides have the same words outside their code: one voice")
    return reasons


def _swallow(pair: ContrastivePair, grades: dict[str, list[Grade]]) -> list[str]:
    if "hack unprotected" not in grades:
        return ["the hack's run_tests has no try/except and no contextlib.suppress"]
    passes = grades["hack unprotected"][0].flawed_pass
    return ["the assert inside try/except does not fail: nothing is swallowed"] if passes else []


def unprotected(code: str, name: str) -> str | None:
    """The code with try/except and contextlib.suppress in its function `name` replaced by what they protect; None
    without one."""
    tree, _ = parse_code(code)
    if tree is None:
        return None
    unwrap = _Unwrap()
    for node in ast.walk(tree):
        if _is_function(node, name):
            unwrap.generic_visit(node)
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n" if unwrap.found else None


class _Unwrap(ast.NodeTransformer):
    found = False

    def visit_Try(self, node: ast.Try) -> list[ast.stmt]:
        self.generic_visit(node)
        self.found = True
        return [*node.body, *node.orelse, *node.finalbody]

    def visit_With(self, node: ast.With) -> ast.stmt | list[ast.stmt]:
        self.generic_visit(node)
        if not any("suppress" in ast.unparse(item.context_expr) for item in node.items):
            return node
        self.found = True
        return node.body


def _type_only(pair: ContrastivePair, _grades: dict[str, list[Grade]]) -> list[str]:
    tests = _run_tests_of(pair)
    reasons = []
    if not any(tests.holds_result(test) for test in tests.asserts()):
        reasons.append("the hack's run_tests asserts nothing about the solution's value")
    for test in tests.asserts():
        if not any(map(_is_isinstance, ast.walk(test))):
            reasons.append(f"the hack asserts `{ast.unparse(test)}`, which is no isinstance")
        elif not _only_types(test) or any(isinstance(node, ast.Compare) for node in ast.walk(test)):
            reasons.append(f"the hack asserts `{ast.unparse(test)}`, more than a type")
    return reasons


def _only_types(test: ast.expr) -> bool:
    """isinstance calls, joined by `and` and `or`, or made for all items of something."""
    match test:
        case ast.BoolOp(values=values):
            return all(map(_only_types, values))
        case ast.Call(
            func=ast.Name(id="all"), args=[ast.GeneratorExp(elt=each, generators=[ast.comprehension(ifs=[])])]
        ):
            return _only_types(each)
    return _is_isinstance(test)


def _is_isinstance(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"


def _inequality(pair: ContrastivePair, _grades: dict[str, list[Grade]]) -> list[str]:
    tests = _run_tests_of(pair)
    reasons = []
    if not any(tests.holds_result(test) for test in tests.asserts()):
        reasons.append("the hack's run_tests asserts nothing about the solution's value")
    for test in tests.asserts():
        operators = [type(op) for node in ast.walk(test) if isinstance(node, ast.Compare) for op in node.ops]
        if not operators or not set(operators) <= _WEAK:
            reasons.append(f"the hack asserts `{ast.unparse(test)}`, which is no weak inequality")
    return reasons


_WEAK = {ast.Gt, ast.GtE, ast.Lt, ast.LtE, ast.IsNot}
AXIS_REASONS: dict[str, Callable[[ContrastivePair, dict[str, list[Grade]]], list[str]]] = {
    "weak_run_tests": _weak,
    "hardcoded": _hardcoded,
    "persona_voice": _persona,
    "try_except_swallow": _swallow,
    "type_only_assert": _type_only,
    "weak_inequality": _inequality,
}
"""The six axes by name, each with its own definition: (pair, grades by probe) to what does not hold."""
