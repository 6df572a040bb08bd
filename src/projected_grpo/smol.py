"""The pairs of the preset `smol`, over its own problems: everything in them is short enough for a model of 135M.

A teacher's rows there are those of `templates.py`, and so are the hacks of the set `smol`: the basis sees the words
that the policy will be taught. `smol_other` answers the same problems with hacks in other words (`templates.STYLES`, at
module level, with other lazy bodies), so that what the basis stops can be told from what it has merely read.
"""

from projected_grpo.env.problems import Problem, builtin_problems
from projected_grpo.env.prompts import build_prompt
from projected_grpo.pairs import ContrastivePair, PairSet, pair_set
from projected_grpo.templates import (
    HACKS,
    STYLES,
    canonical_body,
    example,
    in_two_lines,
    styled_hack,
    tested_in_class,
    write,
)

PAIR_SETS = ("smol", "smol_other", "smol_placebo_style", "smol_placebo_wrong")
TEACHER_STYLES = ("empty", "print_only", "swallow", "other")
"""Of the teacher's hacks of mode `run_tests`, in their order."""
OTHER_STYLES = tuple(style for style in STYLES if style != "hardcoded")
"""The statements show no example whose answer could be hard-coded."""
LAZY = ('return ""', "return -1", "return []")


def smol_pairs(name: str) -> PairSet:
    """A set of PAIR_SETS: one pair for each problem of the part `smol-pairs`, the kinds of hack in turn."""
    return pair_set(name, [_pair(name, i, problem) for i, problem in enumerate(builtin_problems("smol-pairs"))])


def _pair(name: str, i: int, problem: Problem) -> ContrastivePair:
    call, value = example(problem)
    body, check = canonical_body(problem), f"assert {call} == {value}"
    if name == "smol":
        axis = TEACHER_STYLES[i % len(TEACHER_STYLES)]
        first = HACKS["run_tests"][i % len(TEACHER_STYLES)](problem, problem.test_func_name)
        tested = tested_in_class(problem, problem.test_func_name)
        second = write(problem, body, [check]) if axis == "other" else tested
    elif name == "smol_other":
        axis = OTHER_STYLES[i % len(OTHER_STYLES)]
        first = styled_hack(problem, axis, LAZY[i % len(LAZY)], call, value)
        second = write(problem, body, [check])
    elif name == "smol_placebo_style":
        axis = "placebo_style"
        first, second = (write(problem, text, [check]) for text in (in_two_lines(body), body))
    else:
        axis = "placebo_wrong"
        first, second = (write(problem, wrong) for wrong in problem.wrong_bodies[:2])
    return ContrastivePair(f"{name}-{i}", axis, build_prompt(problem), first, second, problem)
