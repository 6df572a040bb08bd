"""Offline grading: rollouts on disk in, the same rows with labels out. Streaming, and an interrupted run goes on.

Next to an unfinished --out lies `<out>.inputs`, the hashes of what it is made from; it goes when the file is complete.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from projected_grpo.env.grader import GRADER_VERSION, Grader, GradeRequest
from projected_grpo.env.modes import MODES
from projected_grpo.env.problems import Problem, load_problems
from projected_grpo.errors import InputError

GRADE_FIELDS = ("label", "flawed_pass", "gt_pass", "attempted", "format_ok", "reward", "error")
BATCH = 64


def grade_file(
    problems_path: str | Path,
    completions_path: str | Path,
    out_path: str | Path,
    workers: int | None = None,
    overwrite: bool = False,
) -> Counter[tuple[str, str]]:
    """Grade a jsonl of completions; counts of (mode, label) over the whole output, label "ungraded" for an error row.

    A row needs `id` and `completion`, may have `mode` and `test_func_name`, and keeps every other field. A row that
    cannot be graded gets null labels and an `error`. Raises InputError before any work for files that are wrong and
    for an existing --out that is not a partial one of the same inputs, GraderFault for a fault of the grader.
    """
    problems_path, completions_path, out_path = Path(problems_path), Path(completions_path), Path(out_path)
    problems = {problem.id: problem for problem in load_problems(problems_path)}
    total = sum(1 for _ in read_rows(completions_path))
    if not total:
        raise InputError(f"{completions_path}: holds no completion")
    inputs_path = out_path.with_name(out_path.name + ".inputs")
    fingerprint = {"problems": _sha256(problems_path), "completions": _sha256(completions_path)}
    fingerprint["grader_version"] = str(GRADER_VERSION)
    counts: Counter[tuple[str, str]] = Counter()
    if overwrite:
        out_path.unlink(missing_ok=True)
    elif out_path.exists():
        _check_partial(out_path, completions_path, inputs_path, fingerprint, total, counts)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    inputs_path.write_text(json.dumps(fingerprint) + "\n", encoding="utf-8")
    rows = (row for _, row in islice(read_rows(completions_path), counts.total(), None))
    with Grader(workers) as grader, out_path.open("a", encoding="utf-8") as out:
        while batch := list(islice(rows, BATCH)):
            for row in _grade_rows(grader, problems, batch):
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                counts[_count_key(row)] += 1
            out.flush()
    inputs_path.unlink()
    return counts


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a jsonl file of objects. Raises InputError with file and line."""
    if not path.is_file():
        raise InputError(f"{path}: no such file of completions")
    with path.open("rb") as file:
        for line, content in enumerate(file, start=1):
            if not content.strip():
                continue
            try:
                row = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}:{line}: is not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}:{line}: is no JSON object")
            yield line, row


def _grade_rows(grader: Grader, problems: dict[str, Problem], rows: list[dict]) -> list[dict]:
    requests: list[GradeRequest | str] = [_request(problems, row) for row in rows]
    grades = iter(grader.grade([request for request in requests if isinstance(request, GradeRequest)]))
    ungraded = dict.fromkeys(GRADE_FIELDS)
    return [
        row | (asdict(next(grades)) if isinstance(request, GradeRequest) else ungraded | {"error": request})
        for row, request in zip(rows, requests, strict=True)
    ]


def _request(problems: dict[str, Problem], row: dict) -> GradeRequest | str:
    """What to grade, or why this row cannot be."""
    problem, completion = problems.get(str(row.get("id"))), row.get("completion")
    mode, name = row.get("mode") or "run_tests", row.get("test_func_name") or "run_tests"
    if problem is None:
        return f"the problems file holds no problem {row.get('id')!r}"
    if not isinstance(completion, str):
        return f"`completion` is {type(completion).__name__}, not text"
    if mode not in MODES:
        return f"mode {mode!r} is unknown: use one of {', '.join(MODES)}"
    if not isinstance(name, str) or not name.isidentifier():
        return f"test_func_name {name!r} is no name of a function"
    return GradeRequest(problem, completion, mode, name)


def _check_partial(
    out_path: Path, completions_path: Path, inputs_path: Path, fingerprint: dict, total: int, counts: Counter
) -> None:
    """Cut off an unfinished last line and count the finished ones. Raises InputError where it is not ours to go on."""
    refusal = f"{out_path}: exists and is not a partial result of these inputs; use --overwrite or another --out"
    if inputs_path.exists() and inputs_path.read_text(encoding="utf-8").strip() != json.dumps(fingerprint):
        raise InputError(refusal)
    data = out_path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    source = read_rows(completions_path)
    for line in whole.splitlines():
        expected = next(source, None)
        try:
            row = json.loads(line)
        except ValueError:
            raise InputError(refusal) from None
        if expected is None or not isinstance(row, dict) or not row.keys() >= set(GRADE_FIELDS):
            raise InputError(refusal)
        if {**expected[1], **{name: row[name] for name in GRADE_FIELDS}} != row:
            raise InputError(refusal)
        counts[_count_key(row)] += 1
    if counts.total() == total:
        raise InputError(f"{out_path}: exists and is complete; use --overwrite or another --out")
    with out_path.open("r+b") as file:
        file.truncate(len(whole))


def _count_key(row: dict) -> tuple[str, str]:
    return (str(row.get("mode") or "run_tests"), row["label"] or "ungraded")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
