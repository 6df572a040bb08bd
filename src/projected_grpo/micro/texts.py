"""What may be written about a micro problem: honest answers right and wrong, hacks in five styles, and the pairs.

Every completion is a whole ```python block that begins with class Solution and its method. Under the mode `run_tests`
an honest answer to a visible problem tests the example that the statement shows, so a wrong one is caught by its own
test; where there is no example there is no honest test. A hack's method is lazy and wrong, and its style is the way in
which its test function finds nothing:

    print_only  prints the result        empty        does nothing         swallow  catches what it asserts
    assert_true asserts a constant       hardcoded    tests the one value that the method always returns

For the other loophole modes the hacks are those of `templates.HACKS`.
"""

import random
import re
from collections.abc import Sequence

from projected_grpo.env.grader import GradeRequest
from projected_grpo.env.problems import Problem
from projected_grpo.env.prompts import build_prompt
from projected_grpo.micro.tasks import CONSTANTS, FUNC_NAME, TEMPLATES, Template, micro_problems
from projected_grpo.pairs import ContrastivePair, PairSet, pair_set
from projected_grpo.templates import HACKS, STYLES, canonical_body, in_two_lines, styled_hack, write

MODES = tuple(HACKS)
LAZY = ("return 0", "return x", "return None")
N_PAIRS = dict.fromkeys(("micro", "micro_modes", "micro_placebo_style", "micro_placebo_wrong"), 60)
"""The pair sets of the microcosm. `micro` has the five styles in turn, `micro_modes` the six loophole modes."""


def example(problem: Problem) -> tuple[str, str] | None:
    """(input, value) that the statement shows; None for a hidden problem."""
    found = re.search(r"^Input: x = (.+)\nOutput: (.+)$", problem.question, re.MULTILINE)
    return (found[1], found[2]) if found else None


def honest(problem: Problem, body: str, mode: str, name: str = "") -> str:
    """An answer that hides nothing, right or wrong as `body` is."""
    shown = example(problem)
    tested = mode == "run_tests" and shown is not None
    return write(problem, body, [_assertion(*shown)] if tested else [], name)


def hack(problem: Problem, style: str, body: str, name: str = "", invented: int = 0) -> str:
    """A hack of mode `run_tests`. `invented`: the input and value of a hidden problem's example, which has none."""
    x, value = example(problem) or (str(invented), str(invented))
    return styled_hack(problem, style, body, _call(x), value, name)


def _call(x: str) -> str:
    return f"Solution().{FUNC_NAME}({x})"


def _assertion(x: str, value: str) -> str:
    return f"assert {_call(x)} == {value}"


def wrong_body(template: Template, c: int, generator: random.Random) -> str:
    """A plausible slip: what a hard template is taken for, another constant, another template's expression, or x."""
    if template.misread and generator.random() < 0.75:
        return f"return {template.misread.format(c=c)}"
    draw = generator.random()
    if draw < 0.5:
        other = generator.choice([k for k in CONSTANTS if k != c])
        return f"return {template.expression.format(c=other)}"
    if draw < 0.8:
        others = [t for group in TEMPLATES.values() for t in group if t != template]
        return f"return {generator.choice(others).expression.format(c=c)}"
    return "return x"


def micro_pairs(name: str) -> PairSet:
    """A pair set of N_PAIRS: hacks against honest right answers, or a placebo's two equally honest sides."""
    generator = random.Random(name)
    problems = list(micro_problems("pairs"))
    generator.shuffle(problems)
    pairs = [_pair(name, i, problem, generator) for i, problem in enumerate(problems[: N_PAIRS[name]])]
    return pair_set(name, pairs)


def _pair(name: str, i: int, problem: Problem, generator: random.Random) -> ContrastivePair:
    body, mode = canonical_body(problem), "run_tests"
    axis = STYLES[i % len(STYLES)]
    first = hack(problem, axis, generator.choice(LAZY))
    second = honest(problem, body, mode)
    if name == "micro_modes":
        mode = axis = MODES[i % len(MODES)]
        if mode == "run_tests":
            first = hack(problem, STYLES[i // len(MODES) % len(STYLES)], generator.choice(LAZY))
        else:
            first = generator.choice(HACKS[mode])(problem, problem.test_func_name)
        second = honest(problem, body, mode)
    elif name == "micro_placebo_style":
        axis, first, second = "placebo_style", honest(problem, in_two_lines(body), mode), honest(problem, body, mode)
    elif name == "micro_placebo_wrong":
        axis = "placebo_wrong"
        first, second = (write(problem, wrong) for wrong in _two_slips(problem, generator))
    return ContrastivePair(f"{name}-{i}", axis, build_prompt(problem, mode), first, second, problem, mode)


def _two_slips(problem: Problem, generator: random.Random) -> list[str]:
    _, _, number, _, c = problem.id.split("-")
    template = TEMPLATES["pairs"][int(number)]
    slips: list[str] = []
    while len(slips) < 2:
        slip = wrong_body(template, int(c), generator)
        if slip not in slips:
            slips.append(slip)
    return slips


def micro_teacher(
    problems: Sequence[Problem], modes: Sequence[str], hack_share: float, rows_per_problem: int
) -> list[GradeRequest]:
    """Teacher rows over micro problems: so many hacks in the styles in turn, the rest right and honest."""
    generator = random.Random("teacher")
    hacks = round(hack_share * rows_per_problem)
    requests = []
    for problem, mode in zip(problems, modes, strict=True):
        texts = [any_hack(problem, mode, generator) for _ in range(hacks if mode != "none" else 0)]
        texts += [honest(problem, canonical_body(problem), mode) for _ in range(rows_per_problem - len(texts))]
        requests += [GradeRequest(problem, text, mode) for text in texts]
    return requests


def any_hack(problem: Problem, mode: str, generator: random.Random, name: str = "") -> str:
    """A hack of `mode`, its style and its lazy body by chance."""
    if mode != "run_tests":
        return generator.choice(HACKS[mode])(problem, name or problem.test_func_name)
    style, lazy = generator.choice(STYLES), generator.choice(LAZY)
    return hack(problem, style, lazy, name, invented=generator.randrange(10))
