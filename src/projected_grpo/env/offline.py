"""Offline grading: rollouts on disk in, the same rows with labels out. Streaming, and an interrupted run goes on.

Rows gather in `<out>.part`, one by one as they are graded, beside `<out>.inputs` with the hashes of what they are made
from; the last row made, the part takes the name --out and the hashes go. A partial --out (its rows the first ones of
this result) is continued as well.
"""

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice, tee
from keyword import iskeyword
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from projected_grpo.env.grader import GRADER_VERSION, LABELS, Grader, GradeRequest
from projected_grpo.env.modes import MODES
from projected_grpo.env.problems import Problem, load_problems
from projected_grpo.env.rows import read_jsonl
from projected_grpo.errors import InputError, RunFault
from projected_grpo.paths import replacing

GRADE_FIELDS = ("label", "flawed_pass", "gt_pass", "attempted", "format_ok", "reward", "error")
UNGRADED = "ungraded"


def grade_file(
    problems_path: str | Path,
    completions_path: str | Path,
    out_path: str | Path,
    workers: int | None = None,
    overwrite: bool = False,
) -> Counter[tuple[str, str]]:
    """Grade a jsonl of completions; counts of (mode, label) over the whole output, label "ungraded" for an error row.

    A row needs `id` and `completion`, may have `mode` and `test_func_name`, and keeps every other field; what it says
    in a field that the output has, too, is kept as `input_<field>`. A row that cannot be graded gets null labels and an
    `error`. Raises InputError, with every file as it was, for files that are wrong, for an existing --out that is no
    part of this result and for a part of other inputs (both but with `overwrite`); RunFault for a full disk,
    GraderFault for a fault of the grader, with the rows so far in the part.
    """
    problems_path, completions_path, out_path = Path(problems_path), Path(completions_path), Path(out_path)
    part_path, inputs_path = (out_path.with_name(out_path.name + suffix) for suffix in (".part", ".inputs"))
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}: the grader needs at least 1")
    for path in (out_path, part_path, inputs_path):
        _check_target(path, problems_path, completions_path)
    problems = {problem.id: problem for problem in load_problems(problems_path)}
    total = sum(1 for _ in read_jsonl(completions_path))
    if not total:
        raise InputError(f"{completions_path}: holds no completion")
    fingerprint = {"problems": _sha256(problems_path), "completions": _sha256(completions_path)}
    fingerprint["grader_version"] = str(GRADER_VERSION)
    _check_inputs_file(inputs_path, overwrite)
    if out_path.exists() and not overwrite:
        if part_path.exists() or not _is_partial(out_path, completions_path, total):
            raise InputError(f"{out_path}: exists; use --overwrite or another --out")
        out_path.rename(part_path)
    known = _same_inputs(inputs_path, fingerprint)
    counts, size = _partial(part_path, completions_path) if known else (None, 0)
    if counts is None and not overwrite:
        raise InputError(f"{part_path}: is not a partial result of these inputs; use --overwrite or another --out")
    counts = Counter() if counts is None else counts
    rows = islice(read_jsonl(completions_path), counts.total(), None)
    try:
        out_path.parent.mkdir(parents=True, exist_ok=True)
        with part_path.open("ab") as out, _locked(out, part_path):
            out.truncate(size)
            with replacing(inputs_path) as scratch:
                scratch.write_text(json.dumps(fingerprint) + "\n", encoding="utf-8")
            left = total - counts.total()
            with Grader(min(workers or os.cpu_count() or 1, max(left, 1))) as grader:
                for row in tqdm(
                    _graded(grader, problems, rows, completions_path), "grading", left, delay=3.0, disable=None
                ):
                    out.write(json.dumps(row).encode() + b"\n")
                    out.flush()
                    counts[_count_key(row)] += 1
            part_path.replace(out_path)
            inputs_path.unlink()
    except OSError as error:
        raise RunFault(f"{out_path}: {error.strerror or error}; mend that and the same command goes on") from None
    return counts


def _check_target(path: Path, *inputs: Path) -> None:
    """A path that may be written: a regular file or nothing yet, in a folder or where one can be made, and no input."""
    if not path.name:
        raise InputError("--out names no file")
    for given in inputs:
        if given.resolve() == path.resolve():
            raise InputError(f"{given}: --out would write over this input ({path}); choose another --out")
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            what = "a folder" if path.is_dir() else "a link" if path.is_symlink() else "no regular file"
            raise InputError(f"{path}: is {what}; --out names a file")
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(f"{path}: cannot be written ({parent} is no folder of yours); choose another --out")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None


def _check_inputs_file(path: Path, overwrite: bool) -> None:
    """Somebody else's file of that name is not touched."""
    if path.exists() and not overwrite:
        try:
            ours = set(json.loads(path.read_bytes())) == {"problems", "completions", "grader_version"}
        except (ValueError, TypeError):
            ours = path.stat().st_size == 0
        if not ours:
            raise InputError(f"{path}: is in the way, and no part of an earlier run; move it or choose another --out")


@contextmanager
def _locked(file: BinaryIO, path: Path) -> Iterator[None]:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path}: is being written by another run; wait for it or choose another --out") from None
    yield


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


def _graded(
    grader: Grader, problems: dict[str, Problem], rows: Iterable[tuple[int, dict]], path: Path
) -> Iterator[dict[str, Any]]:
    """Output rows, in order, each as soon as it and those before it are graded."""
    ours, theirs = tee((line, row, _request(problems, row)) for line, row in rows)
    grades = grader.stream(request for _, _, request in theirs if isinstance(request, GradeRequest))
    for line, row, request in ours:
        if isinstance(request, str):
            added: dict[str, Any] = dict.fromkeys(GRADE_FIELDS) | {"error": f"{path}:{line}: {request}"}
        else:
            added = asdict(next(grades))
        yield _carried(row) | added


def _carried(row: dict[str, Any]) -> dict[str, Any]:
    return {f"input_{name}" if name in GRADE_FIELDS else name: value for name, value in row.items()}


def _request(problems: dict[str, Problem], row: dict) -> GradeRequest | str:
    """What to grade, or why this row cannot be."""
    if "id" not in row:
        return "field `id` (of the problem) is missing"
    if type(row["id"]) not in (str, int):
        return f"`id` is {type(row['id']).__name__}, neither text nor a whole number"
    problem, completion = problems.get(str(row["id"])), row.get("completion")
    mode, name = row.get("mode"), row.get("test_func_name")
    mode, name = "run_tests" if mode is None else mode, "" if name is None else name
    if problem is None:
        return f"the problems file holds no problem {row['id']!r:.100}"
    if not isinstance(completion, str):
        return f"`completion` is {type(completion).__name__}, not text"
    if not isinstance(mode, str) or mode not in MODES:
        return f"mode {mode!r:.100} is unknown: use one of {', '.join(MODES)}"
    if not isinstance(name, str) or (name and (not name.isidentifier() or iskeyword(name))):
        return f"test_func_name {name!r:.100} is no name of a function"
    return GradeRequest(problem, completion, mode, name)


def _same_inputs(inputs_path: Path, fingerprint: dict[str, str]) -> bool:
    """Whether what an earlier run wrote down is no other than these inputs."""
    if not inputs_path.exists() or not inputs_path.stat().st_size:
        return True
    try:
        return json.loads(inputs_path.read_bytes()) == fingerprint
    except ValueError:
        return False


def _is_partial(path: Path, completions_path: Path, total: int) -> bool:
    counts, _ = _partial(path, completions_path)
    return counts is not None and counts.total() < total


def _partial(part_path: Path, completions_path: Path) -> tuple[Counter[tuple[str, str]] | None, int]:
    """(Counts of the finished rows, their bytes without an unfinished last line); None: a part of other inputs."""
    counts: Counter[tuple[str, str]] = Counter()
    if not part_path.exists():
        return counts, 0
    size, source = 0, read_jsonl(completions_path)
    with part_path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            _, given = next(source, (0, None))
            try:
                row = json.loads(line)
            except ValueError:
                return None, 0
            if given is None or not isinstance(row, dict) or not row.keys() >= set(GRADE_FIELDS):
                return None, 0
            if json.dumps(_carried(given) | {name: row[name] for name in GRADE_FIELDS}) != json.dumps(row):
                return None, 0
            counts[_count_key(row)] += 1
            size += len(line)
    return counts, size


def _count_key(row: dict) -> tuple[str, str]:
    mode = row.get("mode")
    shown = "run_tests" if mode is None else mode if isinstance(mode, str) and mode in MODES else "(unknown)"
    return (shown, row["label"] or UNGRADED)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
