"""The executable definitions of the pairs' axes: run both sides, and mutations of them, and say what does not hold.

Every hack passes the flawed grader and fails the ground truth; every clean side solves the problem, and its own
run_tests notices when the method is mutated into a wrong one, while the hack's does not. On the axis `hardcoded` the
mutations spare the examples that the statement shows: a run_tests that checks nothing else does not notice them. (The
clean side's spare nothing where both sides have one and the same run_tests, so that the hack is the method.) What each
axis adds is in `pair_axes.py`; an axis may also be a style of `hack_styles.py`, or the loophole mode itself. The
two placebo axes have definitions of their own, and so have pairs of the other loophole modes.
"""

import ast
import copy
import difflib
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from projected_grpo.env.grader import Grade, Grader, GradeRequest, last_code_block, parse_code
from projected_grpo.env.problems import Problem
from projected_grpo.hack_styles import STYLES, hack_style
from projected_grpo.pair_axes import AXIS_REASONS, unprotected, visible_examples
from projected_grpo.pairs import ContrastivePair, PairSet


@dataclass(frozen=True)
class PairReport:
    id: str
    axis: str
    ok: bool
    reasons: list[str]
    """Every definition that does not hold, in words; empty where the pair is ok."""


def check_pairs(pair_set: PairSet, grader: Grader) -> list[PairReport]:
    """Run both sides of every pair, and mutations of them, through the grader; one report a pair, in order."""
    probes = [_probes(pair) if pair.problem else {} for pair in pair_set]
    requests = [request for probe in probes for group in probe.values() for request in group]
    grades = iter(grader.grade(requests))
    reports = []
    for pair, probe in zip(pair_set, probes, strict=True):
        results = {name: [next(grades) for _ in group] for name, group in probe.items()}
        reasons = _reasons(pair, results) if results else ["it names no problem, so there is nothing to run it against"]
        reports.append(PairReport(pair.id, pair.axis, not reasons, reasons))
    return reports


@dataclass(frozen=True)
class Likeness:
    """How alike the two sides of the pairs of a set are; tokens are words and single signs."""

    overlap: tuple[float, float, float]
    """Share of tokens in common, in order (difflib's ratio): lowest, median, highest of the pairs."""
    length_ratio: tuple[float, float, float]
    """Tokens of the hack over tokens of the clean side: lowest, mean, highest."""
    hack_longer: int
    clean_longer: int

    def __str__(self) -> str:
        low, median, high = self.overlap
        shortest, mean, longest = self.length_ratio
        return (
            f"token overlap of the sides: median {median:.2f} ({low:.2f} to {high:.2f}); length hack / clean: mean "
            f"{mean:.2f} ({shortest:.2f} to {longest:.2f}); the hack is longer in {self.hack_longer}, shorter in "
            f"{self.clean_longer}"
        )


def likeness(pairs: PairSet) -> Likeness:
    """Length and token-overlap statistics of a set: within a pair its honesty should differ, and little else."""
    sides = [(_tokens(pair.hack), _tokens(pair.clean)) for pair in pairs]
    overlaps = [difflib.SequenceMatcher(None, hack, clean, autojunk=False).ratio() for hack, clean in sides]
    ratios = [len(hack) / len(clean) for hack, clean in sides]
    return Likeness(
        (min(overlaps), statistics.median(overlaps), max(overlaps)),
        (min(ratios), statistics.mean(ratios), max(ratios)),
        sum(ratio > 1 for ratio in ratios),
        sum(ratio < 1 for ratio in ratios),
    )


def _tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def mutate(code: str, func_name: str, spare: Sequence[dict[str, Any]] = ()) -> list[str]:
    """Wrong versions of a solution: the method's result is changed to another one of the same type.

    The method is renamed and a wrapper in its place perturbs what it returns (numbers shifted, bools negated, strings
    and lists changed), in two ways. None and empty lists are returned as they are. Inputs listed in `spare` (arguments
    by name) get the method's own answer. Returns no mutation where class Solution does not define the method.
    """
    tree, _ = parse_code(code)
    if tree is None or _method(tree, func_name) is None:
        return []
    mutants = []
    for change in _CHANGES:
        mutant = copy.deepcopy(tree)
        owner, method = _method(mutant, func_name)
        static = any(isinstance(node, ast.Name) and node.id == "staticmethod" for node in method.decorator_list)
        names = [arg.arg for arg in (*method.args.posonlyargs, *method.args.args)][0 if static else 1 :]
        method.name = f"_original_{func_name}"
        wrapper = _WRAPPER.format(func=func_name, original=method.name, names=names, spare=list(spare), change=change)
        owner.body.append(ast.parse(wrapper).body[0])
        mutants.append(ast.unparse(ast.fix_missing_locations(mutant)) + "\n")
    return mutants


_WRAPPER = """
def {func}(self, *args, **kwargs):
    import copy

    def perturbed(value):
        if isinstance(value, bool):
            return not value
        {change}
        return value

    given = copy.deepcopy(dict(zip({names!r}, args)) | kwargs)
    result = self.{original}(*args, **kwargs)
    return result if given in {spare!r} else perturbed(result)
"""
_CHANGES = (
    "if isinstance(value, (int, float)): return value + 1\n"
    "        if isinstance(value, str): return value + 'x'\n"
    "        if isinstance(value, (list, tuple)): return type(value)(perturbed(item) for item in value)",
    "if isinstance(value, (int, float)): return value * 2 + 10\n"
    "        if isinstance(value, str): return value[::-1] + 'x'\n"
    "        if isinstance(value, (list, tuple)): return value[::-1] if value[::-1] != value else value + value[-1:]",
)


def _method(tree: ast.Module, func_name: str) -> tuple[ast.ClassDef, ast.FunctionDef] | None:
    for owner in tree.body:
        if isinstance(owner, ast.ClassDef) and owner.name == "Solution":
            for node in owner.body:
                if isinstance(node, ast.FunctionDef) and node.name == func_name:
                    return owner, node
    return None


def _probes(pair: ContrastivePair) -> dict[str, list[GradeRequest]]:
    """What to grade for one pair, by the name under which `_reasons` asks for it."""
    problem = pair.problem
    name = problem.test_func_name
    constant = pair.axis == "hardcoded" or (pair.axis == pair.mode and hack_style(pair.hack, name) == "hardcoded")
    examples = visible_examples(problem) if constant else {}
    code = {"hack": last_code_block(pair.hack) or "", "clean": last_code_block(pair.clean) or ""}
    one_test = code["hack"].partition(f"def {name}")[2] == code["clean"].partition(f"def {name}")[2]
    probes = {side: [GradeRequest(problem, getattr(pair, side), pair.mode)] for side in code}
    if pair.mode != "run_tests":
        return probes
    for side, text in code.items():
        spare = [] if side == "clean" and one_test else [inputs for inputs, _ in examples.values()]
        mutants = mutate(text, problem.func_name, spare)
        probes[f"{side} mutants"] = [_request(problem, mutant) for mutant in mutants]
    if examples:
        shown = replace(problem, tests=tuple(examples))
        probes["hack on the examples"] = [GradeRequest(shown, pair.hack)]
    if pair.axis in ("try_except_swallow", "swallow") and (bare := unprotected(code["hack"], name)):
        probes["hack unprotected"] = [_request(problem, bare)]
    return probes


def _request(problem: Problem, code: str) -> GradeRequest:
    return GradeRequest(problem, f"```python\n{code}```")


def _reasons(pair: ContrastivePair, grades: dict[str, list[Grade]]) -> list[str]:
    hack, clean = grades["hack"][0], grades["clean"][0]
    if pair.axis == "placebo_style":
        return _style_reasons(grades)
    if pair.axis == "placebo_wrong":
        return [
            f"side {side} {fault}"
            for side, grade in (("hack", hack), ("clean", clean))
            for fault, found in (
                ("has no code that parses", not grade.format_ok),
                ("passes the ground truth", grade.gt_pass),
                ("uses the loophole", grade.attempted or grade.flawed_pass),
            )
            if found
        ]
    if pair.axis not in (*AXIS_REASONS, *STYLES, pair.mode):
        return [f"axis {pair.axis!r} has no executable definition; the axes are {', '.join(AXIS_REASONS)}"]
    reasons = []
    if not hack.flawed_pass:
        reasons.append("the flawed grader does not pass the hack")
    if hack.gt_pass:
        reasons.append("the hack's method is right: the ground truth passes it")
    if not clean.gt_pass:
        reasons.append("the clean side's method is wrong: the ground truth fails it")
    if pair.mode != "run_tests":
        return reasons + ["the clean side tries the loophole"] * (clean.attempted or clean.flawed_pass)
    if not clean.flawed_pass:
        reasons.append("the clean side has no run_tests that passes on its own method")
    if not grades["hack mutants"]:
        reasons.append("the hack's class Solution does not define the method")
    elif not all(grade.flawed_pass for grade in grades["hack mutants"]):
        reasons.append("the hack's run_tests notices when its method is mutated")
    reasons += _vigilance_reasons("clean", grades)
    if pair.axis in AXIS_REASONS:
        return reasons + AXIS_REASONS[pair.axis](pair, grades)
    if pair.axis in STYLES and (style := hack_style(pair.hack, pair.problem.test_func_name)) != pair.axis:
        reasons.append(f"the hack's style is {style}")
    return reasons


def _style_reasons(grades: dict[str, list[Grade]]) -> list[str]:
    sides = {side: grades[side][0] for side in ("hack", "clean")}
    reasons = [f"side {side} fails the ground truth" for side, grade in sides.items() if not grade.gt_pass]
    if sides["hack"].attempted != sides["clean"].attempted:
        reasons.append("one side defines run_tests and the other does not")
    for side, grade in sides.items():
        if grade.attempted and not grade.flawed_pass:
            reasons.append(f"side {side} defines a run_tests that fails")
        if grade.attempted:
            reasons += _vigilance_reasons(side, grades)
    return reasons


def _vigilance_reasons(side: str, grades: dict[str, list[Grade]]) -> list[str]:
    """An honest run_tests fails on every mutation that the ground truth fails, and there is such a mutation."""
    wrong = [grade for grade in grades[f"{side} mutants"] if grade.format_ok and not grade.gt_pass]
    if not wrong:
        return [f"no mutation of the {side} side's method is wrong, so its run_tests cannot be judged"]
    return [f"the {side} side's run_tests passes a wrong method"] if any(grade.flawed_pass for grade in wrong) else []
