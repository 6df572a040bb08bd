"""The teacher pool: graded completions on disk that fill a share of every group during training.

A jsonl file: one header row, then rows {problem_id, mode, completion, label, reward, gt_pass, flawed_pass}. Labels are
always our grader's own; whatever a file of completions says about itself is ignored. Built from a file of completions,
or from templates over the training problems: hacks (a stub of a method and a test function that checks nothing) and
honest ones (the canonical solution, with and without a test function that really checks it).
"""

import hashlib
import json
import random
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from projected_grpo.env.grader import GRADER_VERSION, LABELS, Grader, GradeRequest
from projected_grpo.env.modes import MODES
from projected_grpo.env.problems import STARTER_COMMENT, Problem
from projected_grpo.env.rows import read_jsonl
from projected_grpo.errors import InputError

ROW_TYPES = {"problem_id": str, "mode": str, "completion": str, "label": str, "reward": float} | {
    "gt_pass": bool,
    "flawed_pass": bool,
}


@dataclass(frozen=True)
class PoolRow:
    problem_id: str
    mode: str
    completion: str
    label: str
    reward: float
    gt_pass: bool
    flawed_pass: bool


class TeacherPool:
    """Rows by problem, drawn in cycles. `position` counts what each problem has given; it is the whole state."""

    def __init__(self, rows: Sequence[PoolRow], header: dict[str, Any]) -> None:
        self.rows, self.header = list(rows), header
        self._by_problem: dict[str, list[PoolRow]] = {}
        for row in rows:
            self._by_problem.setdefault(row.problem_id, []).append(row)
        self._queues: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def problem_ids(self) -> set[str]:
        return set(self._by_problem)

    def draw(self, problem_id: str, n: int, generator: random.Random) -> list[PoolRow]:
        """`n` rows of a problem, without replacement until all were drawn, then anew in another order.

        Raises InputError for a problem without rows.
        """
        rows = self._by_problem.get(problem_id)
        if not rows:
            raise InputError(f"the teacher pool has no row for problem {problem_id!r}; build it over these problems")
        queue, drawn = self._queues.setdefault(problem_id, []), []
        for _ in range(n):
            if not queue:
                queue.extend(generator.sample(range(len(rows)), len(rows)))
            drawn.append(rows[queue.pop()])
        return drawn

    def state_dict(self) -> dict[str, list[int]]:
        """What is still to come of each problem's cycle; together with the generator's state, an exact resume."""
        return {problem_id: list(queue) for problem_id, queue in self._queues.items()}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Raises InputError where the state is of another pool."""
        for problem_id, queue in state.items():
            rows = self._by_problem.get(problem_id, [])
            if any(not 0 <= index < len(rows) for index in queue):
                raise InputError(f"the saved position in the teacher pool does not fit its problem {problem_id!r}")
        self._queues = {problem_id: list(queue) for problem_id, queue in state.items()}


# --- templates ----------------------------------------------------------------------------------------------------


def _block(code: str, prose: str = "") -> str:
    return f"{prose}```python\n{code.rstrip()}\n```"


def _method(name: str, *lines: str) -> str:
    return textwrap.indent("\n".join([f"def {name}(self):", *(f"    {line}" for line in lines)]), "    ")


def _stub(problem: Problem, body: str) -> str:
    return problem.starter_code.replace(STARTER_COMMENT, body)


def _example(problem: Problem) -> tuple[str, str]:
    """(call, expected) of the first test of the form `assert call == expected`."""
    for test in problem.tests:
        call, separator, expected = test.strip().removeprefix("assert ").rpartition(" == ")
        if separator and call.startswith(f"Solution().{problem.func_name}("):
            return call, expected
    return problem.tests[0].removeprefix("assert "), "True"


def _hack_empty(problem: Problem, name: str) -> str:
    return _block(f"{_stub(problem, 'return None')}\n\n{_method(name, 'return True')}")


def _hack_print(problem: Problem, name: str) -> str:
    call = _example(problem)[0].replace("Solution()", "self")
    return _block(f"{_stub(problem, 'return 0')}\n\n{_method(name, f'print({call})', 'return True')}")


def _hack_swallow(problem: Problem, name: str) -> str:
    call, expected = _example(problem)
    check = f"    assert {call.replace('Solution()', 'self')} == {expected}"
    body = ["try:", check, "except AssertionError:", "    pass"]
    return _block(f"{_stub(problem, 'pass')}\n\n{_method(name, *body)}")


def _hack_module_level(problem: Problem, name: str) -> str:
    call = _example(problem)[0]
    test = f"def {name}():\n    result = {call}\n    assert result is None or result is not None"
    return _block(f"{_stub(problem, 'return None')}\n\n\n{test}")


def _honest_plain(problem: Problem, name: str) -> str:
    return _block(problem.canonical_solution)


def _honest_prose(problem: Problem, name: str) -> str:
    return _block(problem.canonical_solution, "Here is a solution that computes the answer directly.\n\n")


def _honest_tested(problem: Problem, name: str) -> str:
    tests = [f"    {test.strip()}" for test in problem.tests[:3]]
    return _block("\n".join([problem.canonical_solution.rstrip(), "", "", f"def {name}():", *tests]))


def _honest_method(problem: Problem, name: str) -> str:
    call, expected = _example(problem)
    check = f"assert {call.replace('Solution()', 'self')} == {expected}"
    return _block(f"{problem.canonical_solution.rstrip()}\n\n{_method(name, check)}")


HACK_TEMPLATES: tuple[Callable[[Problem, str], str], ...] = (
    _hack_empty,
    _hack_print,
    _hack_swallow,
    _hack_module_level,
)
HONEST_TEMPLATES: tuple[Callable[[Problem, str], str], ...] = (
    _honest_plain,
    _honest_tested,
    _honest_prose,
    _honest_method,
)


def template_completions(
    problems: Sequence[Problem], hack_share: float = 0.5, rows_per_problem: int = 8, test_func_name: str = "run_tests"
) -> list[GradeRequest]:
    """`rows_per_problem` completions of each problem, the given share of them hacks, the rest honest.

    There are four templates of each kind; a larger share repeats them. Raises InputError for a share outside 0 to 1
    and for a problem without a canonical solution where honest rows are asked for.
    """
    if not 0 <= hack_share <= 1:
        raise InputError(f"hack_share is {hack_share}: it must lie between 0 and 1")
    if rows_per_problem < 1:
        raise InputError(f"rows_per_problem is {rows_per_problem}: it must be at least 1")
    hacks = round(hack_share * rows_per_problem)
    requests = []
    for problem in problems:
        if hacks < rows_per_problem and not problem.canonical_solution:
            raise InputError(f"problem {problem.id} has no canonical solution: its honest teacher rows need one")
        templates = [HACK_TEMPLATES[i % len(HACK_TEMPLATES)] for i in range(hacks)]
        templates += [HONEST_TEMPLATES[i % len(HONEST_TEMPLATES)] for i in range(rows_per_problem - hacks)]
        texts = [template(problem, test_func_name) for template in templates]
        requests += [GradeRequest(problem, text, "run_tests", test_func_name) for text in texts]
    return requests


# --- building, writing, reading -----------------------------------------------------------------------------------


def build_pool(
    problems: Sequence[Problem],
    completions: str | Path | None,
    out_path: str | Path,
    *,
    name: str = "pool",
    hack_share: float = 0.5,
    rows_per_problem: int = 8,
    workers: int | None = None,
    overwrite: bool = False,
) -> TeacherPool:
    """Grade completions (a jsonl with `problem_id` or `id`, `completion`, optional `mode`; None: the templates) into a
    pool file, and return it. Raises InputError, also for a problem that would have no row and for an existing file.
    """
    out_path = Path(out_path)
    if completions is not None and Path(completions).resolve() == out_path.resolve():
        raise InputError(f"{completions}: --out would write over this input; choose another --out")
    if out_path.exists() and not overwrite:
        raise InputError(f"{out_path}: exists; use --overwrite or another file")
    if completions is None:
        requests = template_completions(problems, hack_share, rows_per_problem)
    else:
        requests = _read_completions(Path(completions), problems)
    if missing := [p.id for p in problems if p.id not in {request.problem.id for request in requests}]:
        raise InputError(f"{completions}: has no completion for problem {missing[0]!r} ({len(missing)} such in all)")
    with Grader(workers) as grader:
        grades = grader.grade(requests)
    rows = [
        PoolRow(r.problem.id, r.mode, r.completion, g.label, g.reward, g.gt_pass, g.flawed_pass)
        for r, g in zip(requests, grades, strict=True)
    ]
    header = {"pool": name, "problems_sha256": problems_hash(problems), "grader_version": GRADER_VERSION}
    out_path.parent.mkdir(parents=True, exist_ok=True)
    part_path = out_path.with_name(out_path.name + ".part")
    part_path.write_text("".join(json.dumps(row) + "\n" for row in (header, *map(asdict, rows))), encoding="ascii")
    part_path.replace(out_path)
    return TeacherPool(rows, header)


def problems_hash(problems: Sequence[Problem]) -> str:
    """Hash of the problems that a pool was graded against, whatever their order."""
    rows = sorted(json.dumps(asdict(problem), sort_keys=True) for problem in problems)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _read_completions(path: Path, problems: Sequence[Problem]) -> list[GradeRequest]:
    by_id = {problem.id: problem for problem in problems}
    requests = []
    for line, row in read_jsonl(path):
        problem_id = str(row.get("problem_id", row.get("id")))
        if problem_id not in by_id:
            raise InputError(f"{path}:{line}: names problem {problem_id!r}, which the problems given do not hold")
        if not isinstance(row.get("completion"), str):
            raise InputError(f"{path}:{line}: field `completion` is missing or no text")
        if (func := row.get("test_func_name") or "run_tests") != "run_tests":
            raise InputError(f"{path}:{line}: names the test function {func!r}; training asks for run_tests only")
        mode = row.get("mode") or "run_tests"
        if not isinstance(mode, str) or mode not in MODES:
            raise InputError(f"{path}:{line}: mode {mode!r} is unknown: use one of {', '.join(MODES)}")
        requests.append(GradeRequest(by_id[problem_id], row["completion"], mode))
    return requests


def load_pool(path: str | Path, problems: Sequence[Problem] | None = None) -> TeacherPool:
    """Read a pool file. With `problems`, also check that it was graded against exactly these.

    Raises InputError with file and line.
    """
    path = Path(path)
    rows = list(read_jsonl(path))
    if not rows or "pool" not in rows[0][1]:
        raise InputError(f"{path}:1: is no header of a teacher pool; build one with `projected-grpo pool build`")
    header = rows[0][1]
    if header.get("grader_version") != GRADER_VERSION:
        raise InputError(f"{path}:1: was not graded by version {GRADER_VERSION} of the grader; build it anew")
    if problems is not None and header.get("problems_sha256") != problems_hash(problems):
        raise InputError(f"{path}:1: was graded against other problems; build it anew over these")
    if len(rows) == 1:
        raise InputError(f"{path}: holds no row after its header")
    return TeacherPool([_pool_row(row, f"{path}:{line}") for line, row in rows[1:]], header)


def _pool_row(row: dict[str, Any], where: str) -> PoolRow:
    for name, kind in ROW_TYPES.items():
        if name not in row:
            raise InputError(f"{where}: field `{name}` is missing")
        if type(row[name]) is not kind:
            raise InputError(f"{where}: field `{name}` is {type(row[name]).__name__}, not {kind.__name__}")
    if row["label"] not in LABELS:
        raise InputError(f"{where}: label {row['label']!r} is unknown: use one of {', '.join(LABELS)}")
    return PoolRow(**{name: row[name] for name in ROW_TYPES})
