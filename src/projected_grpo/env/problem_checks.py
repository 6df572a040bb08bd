"""Whether the problems of a file are fit to grade with: they load, the right answers pass, the wrong ones fail.

Nothing is dropped in silence: a row that does not load is a fault with its line and reason, and so is a canonical
solution that fails or a plausible wrong one that passes. That a stub passes may lie in the problem ("return 0" can be
the right answer to all tests that somebody wrote) and is told, not counted as a fault.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from projected_grpo.env.grader import Grade, Grader, GradeRequest
from projected_grpo.env.problems import SPLITS, Problem, read_problems
from projected_grpo.errors import InputError
from projected_grpo.paths import data_path

STUBS = {"the starter code": "pass", "`return None`": "return None", "`return 0`": "return 0"}


@dataclass(frozen=True)
class ProblemsReport:
    rows: int
    loaded: int
    with_canonical: int
    canonical_pass: int
    wrong: int
    """Plausible wrong solutions that the file gives."""
    wrong_fail: int
    faults: tuple[str, ...]
    """`file:line: what is wrong`, or `problem ID: what is wrong`."""
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """What a person reads, faults last."""
        found = [f"{self.loaded} of {self.rows} rows load"]
        found.append(f"{self.canonical_pass} of {self.with_canonical} canonical solutions pass")
        if self.loaded > self.with_canonical:
            found.append(f"{self.loaded - self.with_canonical} problems have no canonical solution")
        if self.wrong:
            found.append(f"{self.wrong_fail} of {self.wrong} plausible wrong solutions fail")
        return [*found, *self.notes, *self.faults]


def check_problems(source: str, grader: Grader) -> ProblemsReport:
    """Check a file, or a built-in part by its name. Raises InputError where there is no such file."""
    path = data_path("problems", f"{source}.toml") if source in SPLITS else Path(source)
    problems, faults = read_problems(path)
    rows = len(problems) + len(faults)
    if not rows:
        raise InputError(f"{path}: holds no problem")
    requests = [request for problem in problems for _, request in _probes(problem)]
    grades = iter(grader.grade(requests))
    canonical = passed = wrong = failed = 0
    notes = []
    for problem in problems:
        stubs = []
        for kind, _ in _probes(problem):
            grade = next(grades)
            if kind == "canonical":
                canonical, passed = canonical + 1, passed + grade.gt_pass
                if not grade.gt_pass:
                    faults.append(f"problem {problem.id}: its canonical solution fails: {_reason(grade)}")
            elif kind in STUBS:
                stubs += [kind] * grade.gt_pass
            else:
                wrong, failed = wrong + 1, failed + (not grade.gt_pass)
                if grade.gt_pass:
                    faults.append(f"problem {problem.id}: its tests pass {kind}")
        if stubs:
            notes.append(f"note: the tests of problem {problem.id} pass {', '.join(stubs)}")
    return ProblemsReport(rows, len(problems), canonical, passed, wrong, failed, tuple(faults), tuple(notes))


def _probes(problem: Problem) -> Iterator[tuple[str, GradeRequest]]:
    """(what it is, what to grade) for each solution of a problem whose answer is known beforehand."""
    if problem.canonical_solution:
        yield "canonical", _request(problem, problem.canonical_solution)
    for kind, body in STUBS.items():
        yield kind, _request(problem, problem.with_body(body))
    for number, body in enumerate(problem.wrong_bodies, start=1):
        yield f"its wrong body {number}", _request(problem, problem.with_body(body))


def _request(problem: Problem, code: str) -> GradeRequest:
    return GradeRequest(replace(problem, wrong_bodies=()), f"```python\n{code.rstrip()}\n```", mode="none")


def _reason(grade: Grade) -> str:
    return grade.error or "a wrong answer"
