"""The teacher pool: graded completions on disk that fill a share of every group during training.

A jsonl file: one header row, then rows {problem_id, mode, completion, label, reward, gt_pass, flawed_pass}. Labels are
always our grader's own; what a file of completions says about itself is compared with them and not believed. Built from
a file of completions, from a finished run's rollouts, or from templates over the training problems (`templates.py`).
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from projected_grpo.env.grader import GRADER_VERSION, LABELS, Grade, Grader, GradeRequest
from projected_grpo.env.modes import MODES
from projected_grpo.env.problems import Problem
from projected_grpo.env.rows import read_jsonl
from projected_grpo.errors import InputError

ROLLOUTS = "rollouts.jsonl.gz"
"""The file of a run's folder that holds its labelled rollouts."""
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


@dataclass(frozen=True)
class _Source:
    """One completion to grade, and what its file says about it."""

    request: GradeRequest
    claims: dict[str, Any]
    line: int


CLAIMS = {
    "label": lambda grade: grade.label,
    "gt_pass": lambda grade: grade.gt_pass,
    "flawed_pass": lambda grade: grade.flawed_pass,
    "hacked": lambda grade: grade.attempted,
}
"""Fields in which a file of completions may say what they are, and our own answer. `hacked` is the published one: a
loophole was used, whatever the ground truth says."""


def build_pool(
    problems: Sequence[Problem],
    completions: str | Path | Sequence[GradeRequest],
    out_path: str | Path,
    *,
    name: str = "pool",
    workers: int | None = None,
    overwrite: bool = False,
    inputs: Sequence[str | Path] = (),
) -> TeacherPool:
    """Grade completions into a pool file, and return it.

    `completions`: a jsonl (or .jsonl.gz) of `problem_id` or `id`, `completion`, optional `mode`; or a run's folder,
    whose students' rollouts are taken, each text once a problem; or the completions themselves. The header counts the
    `disagreements`, by field, between what the file says of its rows and our labels, and names the lines.
    `inputs`: more files that must not be written over.
    Raises InputError, also for an existing file, and where no problem would have a row.
    """
    out_path = Path(out_path)
    part_path = out_path.with_name(out_path.name + ".part")
    files = [Path(completions), Path(completions) / ROLLOUTS] if isinstance(completions, str | Path) else []
    for given in (*files, *inputs):
        if Path(given).resolve() in (out_path.resolve(), part_path.resolve()):
            raise InputError(f"{given}: --out {out_path} would write over this input; choose another --out")
    if part_path.exists():
        raise InputError(f"{part_path}: is in the way; remove it or choose another --out")
    if out_path.exists() and not overwrite:
        raise InputError(f"{out_path}: exists; use --overwrite or another file")
    if isinstance(completions, str | Path):
        sources = _read_completions(Path(completions), problems)
    else:
        sources = [_Source(request, {}, 0) for request in completions]
    if not sources:
        raise InputError(f"{completions}: has no completion for any of the {len(problems)} problems")
    with Grader(workers) as grader:
        grades = grader.grade([source.request for source in sources])
    rows = [
        PoolRow(r.problem.id, r.mode, r.completion, g.label, g.reward, g.gt_pass, g.flawed_pass)
        for r, g in zip((source.request for source in sources), grades, strict=True)
    ]
    header = {"pool": name, "problems_sha256": problems_hash(problems), "grader_version": GRADER_VERSION}
    header |= {"rows_sha256": _rows_hash(rows), "disagreements": disagreements(sources, grades)}
    out_path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part_path.write_text("".join(json.dumps(row) + "\n" for row in (header, *map(asdict, rows))), encoding="ascii")
        part_path.replace(out_path)
    except OSError:
        part_path.unlink(missing_ok=True)
        raise
    return TeacherPool(rows, header)


def disagreements(sources: Sequence[_Source], grades: Sequence[Grade]) -> dict[str, dict[str, Any]]:
    """By claimed field: how many rows claim something, and the lines whose claim is not our finding."""
    found: dict[str, dict[str, Any]] = {}
    for field, ours in CLAIMS.items():
        claimed = [
            (s.line, s.claims[field] == ours(g)) for s, g in zip(sources, grades, strict=True) if field in s.claims
        ]
        if claimed:
            found[field] = {"claimed": len(claimed), "lines": [line for line, agrees in claimed if not agrees]}
    return found


def problems_hash(problems: Sequence[Problem]) -> str:
    """Hash of the problems that a pool was graded against, whatever their order."""
    rows = sorted(json.dumps(asdict(problem), sort_keys=True) for problem in problems)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _read_completions(path: Path, problems: Sequence[Problem]) -> list[_Source]:
    by_id = {problem.id: problem for problem in problems}
    from_run = path.is_dir()
    path = path / ROLLOUTS if from_run else path
    sources, seen = [], set()
    for line, row in read_jsonl(path):
        if from_run and row.get("source") != "student":
            continue
        given = row.get("problem_id", row.get("id"))
        if type(given) not in (str, int):
            raise InputError(
                f"{path}:{line}: field `problem_id` (or `id`) is missing, or neither text nor a whole number"
            )
        problem_id = str(given)
        if problem_id not in by_id:
            raise InputError(f"{path}:{line}: names problem {problem_id!r}, which the problems given do not hold")
        if not isinstance(row.get("completion"), str):
            raise InputError(f"{path}:{line}: field `completion` is missing or no text")
        mode = "run_tests" if row.get("mode") is None else row["mode"]
        if not isinstance(mode, str) or mode not in MODES:
            raise InputError(f"{path}:{line}: mode {mode!r} is unknown: use one of {', '.join(MODES)}")
        asked = by_id[problem_id].test_func_name
        if mode == "run_tests" and (func := row.get("test_func_name") or asked) != asked:
            raise InputError(f"{path}:{line}: names the test function {func!r}; training asks for {asked} only")
        if from_run and (problem_id, mode, row["completion"]) in seen:
            continue
        seen.add((problem_id, mode, row["completion"]))
        claims = {field: row[field] for field in CLAIMS if isinstance(row.get(field), bool | str)}
        sources.append(_Source(GradeRequest(by_id[problem_id], row["completion"], mode), claims, line))
    return sources


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
    pool = TeacherPool([_pool_row(row, f"{path}:{line}") for line, row in rows[1:]], header)
    if "rows_sha256" in header and header["rows_sha256"] != _rows_hash(pool.rows):  # older files have none
        raise InputError(
            f"{path}: its rows are not those that were graded (damaged, cut, or edited by hand); build it anew with "
            "`projected-grpo pool build`"
        )
    return pool


def _rows_hash(rows: Sequence[PoolRow]) -> str:
    return hashlib.sha256(json.dumps([asdict(row) for row in rows]).encode()).hexdigest()


def _pool_row(row: dict[str, Any], where: str) -> PoolRow:
    for name, kind in ROW_TYPES.items():
        if name not in row:
            raise InputError(f"{where}: field `{name}` is missing")
        if type(row[name]) is not kind:
            raise InputError(f"{where}: field `{name}` is {type(row[name]).__name__}, not {kind.__name__}")
    if row["label"] not in LABELS:
        raise InputError(f"{where}: label {row['label']!r} is unknown: use one of {', '.join(LABELS)}")
    return PoolRow(**{name: row[name] for name in ROW_TYPES})
