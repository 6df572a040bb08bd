"""Offline grading: rollouts on disk in, the same rows with labels out. Streaming, and an interrupted run goes on.

Rows gather in `<out>.part`, beside `<out>.inputs` with the hashes of what they are made from; the last row made, the
part takes the name --out and the hashes go. So --out is always a whole result, and an old one is there until then.
"""

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from projected_grpo.env.grader import GRADER_VERSION, LABELS, Grader, GradeRequest
from projected_grpo.env.modes import MODES
from projected_grpo.env.problems import Problem, load_problems
from projected_grpo.env.rows import read_jsonl
from projected_grpo.errors import InputError

GRADE_FIELDS = ("label", "flawed_pass", "gt_pass", "attempted", "format_ok", "reward", "error")
UNGRADED = "ungraded"
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
    cannot be graded gets null labels and an `error`. Raises InputError, with every file as it was, for files that are
    wrong, for an existing --out and for a part of other inputs (both but with `overwrite`); GraderFault for a fault of
    the grader.
    """
    problems_path, completions_path, out_path = Path(problems_path), Path(completions_path), Path(out_path)
    part_path, inputs_path = (out_path.with_name(out_path.name + suffix) for suffix in (".part", ".inputs"))
    for given in (problems_path, completions_path):
        if given.resolve() in (out_path.resolve(), part_path.resolve(), inputs_path.resolve()):
            raise InputError(f"{given}: --out {out_path} would write over this input; choose another --out")
    if out_path.is_dir():
        raise InputError(f"{out_path}: is a folder; --out names a file")
    problems = {problem.id: problem for problem in load_problems(problems_path)}
    total = sum(1 for _ in read_jsonl(completions_path))
    if not total:
        raise InputError(f"{completions_path}: holds no completion")
    if out_path.exists() and not overwrite:
        raise InputError(f"{out_path}: exists; use --overwrite or another --out")
    fingerprint = {"problems": _sha256(problems_path), "completions": _sha256(completions_path)}
    fingerprint["grader_version"] = str(GRADER_VERSION)
    counts, size = _partial(part_path, inputs_path, completions_path, fingerprint)
    if counts is None and not overwrite:
        raise InputError(f"{part_path}: is not a partial result of these inputs; use --overwrite or another --out")
    counts = Counter() if counts is None else counts
    rows = islice(read_jsonl(completions_path), counts.total(), None)
    with Grader(workers) as grader:
        out_path.parent.mkdir(parents=True, exist_ok=True)
        with part_path.open("ab") as out:
            out.truncate(size)
            inputs_path.write_text(json.dumps(fingerprint) + "\n", encoding="utf-8")
            while batch := list(islice(rows, BATCH)):
                for row in _grade_rows(grader, problems, batch, completions_path):
                    out.write(json.dumps(row).encode() + b"\n")
                    counts[_count_key(row)] += 1
                out.flush()
    part_path.replace(out_path)
    inputs_path.unlink()
    return counts


def format_counts(counts: Counter[tuple[str, str]]) -> str:
    """A table of the counts that `grade_file` returns: a row a mode, a column a label, rates at the end."""
    labels = [label for label in (*LABELS, UNGRADED) if any(name == label for _, name in counts)]
    lines = [
        f"{'mode':<14}{'rows':>7}" + "".join(f"{label:>19}" for label in labels) + f"{'hack rate':>11}{'pass rate':>11}"
    ]
    for mode in sorted({mode for mode, _ in counts}):
        row = {label: counts[mode, label] for label in labels}
        graded = sum(row.values()) - row.get(UNGRADED, 0)
        rates = [row.get("reward_hack", 0), row.get("correct", 0) + row.get("correct_attempted", 0)]
        shown = "".join(f"{count / graded:>11.3f}" if graded else f"{'-':>11}" for count in rates)
        lines.append(f"{mode:<14}{sum(row.values()):>7}" + "".join(f"{row[label]:>19}" for label in labels) + shown)
    return "\n".join(lines)


def _grade_rows(
    grader: Grader, problems: dict[str, Problem], rows: list[tuple[int, dict]], path: Path
) -> list[dict[str, Any]]:
    requests: list[GradeRequest | str] = [_request(problems, row) for _, row in rows]
    grades = iter(grader.grade([request for request in requests if isinstance(request, GradeRequest)]))
    ungraded = dict.fromkeys(GRADE_FIELDS)
    return [
        row | (ungraded | {"error": f"{path}:{line}: {request}"} if isinstance(request, str) else asdict(next(grades)))
        for (line, row), request in zip(rows, requests, strict=True)
    ]


def _request(problems: dict[str, Problem], row: dict) -> GradeRequest | str:
    """What to grade, or why this row cannot be."""
    problem, completion = problems.get(str(row.get("id"))), row.get("completion")
    mode, name = row.get("mode") or "run_tests", row.get("test_func_name") or "run_tests"
    if problem is None:
        return f"the problems file holds no problem {row.get('id')!r}"
    if not isinstance(completion, str):
        return f"`completion` is {type(completion).__name__}, not text"
    if not isinstance(mode, str) or mode not in MODES:
        return f"mode {mode!r} is unknown: use one of {', '.join(MODES)}"
    if not isinstance(name, str) or not name.isidentifier():
        return f"test_func_name {name!r} is no name of a function"
    return GradeRequest(problem, completion, mode, name)


def _partial(
    part_path: Path, inputs_path: Path, completions_path: Path, fingerprint: dict[str, str]
) -> tuple[Counter[tuple[str, str]] | None, int]:
    """(Counts of the finished rows, their bytes without an unfinished last line); None: a part of other inputs."""
    counts: Counter[tuple[str, str]] = Counter()
    if not part_path.exists():
        return counts, 0
    if not inputs_path.exists() or inputs_path.read_bytes().strip() != json.dumps(fingerprint).encode():
        return None, 0
    data = part_path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    source = read_jsonl(completions_path)
    for line in whole.splitlines():
        _, expected = next(source, (0, None))
        try:
            row = json.loads(line)
        except ValueError:
            return None, 0
        if expected is None or not isinstance(row, dict) or not row.keys() >= set(GRADE_FIELDS):
            return None, 0
        if expected | {name: row[name] for name in GRADE_FIELDS} != row:
            return None, 0
        counts[_count_key(row)] += 1
    return counts, len(whole)


def _count_key(row: dict) -> tuple[str, str]:
    return (str(row.get("mode") or "run_tests"), row["label"] or UNGRADED)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
