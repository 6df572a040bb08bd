"""The matrix of loophole modes: each mode's hacks, and honest solutions, through every mode's grader.

True on its diagonal alone is what makes a mode a loophole of its own: a hack pays where its hint is given and nowhere
else, and a right answer pays everywhere.
"""

from collections.abc import Mapping, Sequence

from projected_grpo.env.grader import Grader, GradeRequest
from projected_grpo.env.modes import MODES
from projected_grpo.env.problems import Problem
from projected_grpo.templates import HACKS, honest_templates

Matrix = dict[tuple[str, str], tuple[int, int]]
"""{(kind of completion, mode): (how many pay, of how many)}."""


def measure(problems: Sequence[Problem], grader: Grader) -> Matrix:
    """Every template over every problem in every mode. "honest" is the kind of the right answers."""
    kinds = HACKS | {"honest": honest_templates("none")}
    cells = [(kind, mode, template) for kind, templates in kinds.items() for template in templates for mode in MODES]
    requests = [
        GradeRequest(problem, template(problem, problem.test_func_name), mode)
        for _, mode, template in cells
        for problem in problems
    ]
    pays = iter(grade.reward > 1 for grade in grader.grade(requests))
    matrix: Matrix = {}
    for kind, mode, _ in cells:
        paid, total = matrix.get((kind, mode), (0, 0))
        matrix[kind, mode] = paid + sum(next(pays) for _ in problems), total + len(problems)
    return matrix


def faults(matrix: Mapping[tuple[str, str], tuple[int, int]]) -> list[str]:
    """Cells that are not as they have to be, in words."""
    found = []
    for (kind, mode), (paid, total) in matrix.items():
        wanted = total if kind in (mode, "honest") else 0
        if paid != wanted:
            found.append(f"{kind} in mode {mode}: {paid} of {total} pay, {wanted} should")
    return found


def format_table(matrix: Mapping[tuple[str, str], tuple[int, int]]) -> str:
    """As Markdown: a row a kind of completion, a column a mode, the share of completions that pay."""
    kinds = list(dict.fromkeys(kind for kind, _ in matrix))
    lines = [f"| completion | {' | '.join(MODES)} |", "| --- |" + " --- |" * len(MODES)]
    for kind in kinds:
        cells = ["{} of {}".format(*matrix[kind, mode]) for mode in MODES]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)
