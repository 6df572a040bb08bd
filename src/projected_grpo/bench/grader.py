"""Speed of the grader against a fresh interpreter for each completion, both measured in one run, in turn.

The other side is what the published harnesses do: the setup code, the solution and the asserts as one program in a new
`python`. A ratio of two numbers of one run says something on a shared machine; a number of milliseconds does not.

Terms: the *own run time* of a row is what its canonical solution takes for all tests in an interpreter that is already
up (the fastest of three). *Overhead* is the wall time of grading it, one at a time, less the own run time; the same
own run time is taken off both sides. *Completions per second* are of whole batches, both sides with as many workers.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from projected_grpo.bench.timing import machine
from projected_grpo.env.grader import Grader, GradeRequest
from projected_grpo.env.problems import Problem
from projected_grpo.errors import RunFault
from projected_grpo.version import code_version

FAST_MS = 2.0
"""Rows of less own run time count for completions per second."""
SLOW_MS = 50.0
"""Rows of more own run time are shown apart: their wall time is their own."""
MAX_OVERHEAD_SHARE, MAX_OVERHEAD_MS, MIN_SPEEDUP = 1 / 8, 6.0, 8.0

_OWN = """
import json, sys, time
def clocked(code, tests):
    names = {}
    exec(setup, names)
    program = compile(tests, "tests", "exec")
    start = time.perf_counter()
    exec(compile(code, "solution", "exec"), names)
    exec(program, names)
    return time.perf_counter() - start
setup, code, tests = json.load(sys.stdin)
print(1e3 * min(clocked(code, tests) for _ in range(3)))
"""


@dataclass(frozen=True)
class Row:
    """One problem's measurements; milliseconds."""

    id: str
    own: float
    grader: float
    """Wall time of grading its canonical solution, median of the repeats."""
    fresh: float

    @property
    def overheads(self) -> tuple[float, float]:
        return self.grader - self.own, self.fresh - self.own


@dataclass(frozen=True)
class Report:
    rows: tuple[Row, ...]
    grader_rate: float
    """Completions per second of batches of fast rows, median over the rounds."""
    fresh_rate: float
    rate_ratio: float
    """Median over the rounds of the ratio within each."""
    fast: int
    workers: int


def program_of(problem: Problem) -> str:
    """Setup code, canonical solution and tests as one program."""
    return "\n".join([problem.setup_code, problem.canonical_solution, *problem.tests])


def run_fresh(program: str) -> None:
    """One program in an interpreter of its own. Raises RunFault where it does not end well."""
    done = subprocess.run([sys.executable, "-"], input=program.encode(), capture_output=True)
    if done.returncode != 0:
        raise RunFault(f"a canonical solution failed in a plain interpreter: {done.stderr.decode()[-200:]}")


def own_time(problem: Problem) -> float:
    """Milliseconds of the canonical solution over all tests, in an interpreter that is up."""
    given = json.dumps([problem.setup_code, problem.canonical_solution, "\n".join(problem.tests)])
    done = subprocess.run([sys.executable, "-c", _OWN], input=given.encode(), capture_output=True)
    if done.returncode != 0:
        raise RunFault(f"problem {problem.id}: the canonical solution failed: {done.stderr.decode()[-200:]}")
    return float(done.stdout)


def measure(problems: Sequence[Problem], workers: int = 2, repeats: int = 5, rounds: int = 5) -> Report:
    """Time both sides in turn. Raises RunFault where a canonical solution does not pass on either side."""
    requests = {p.id: GradeRequest(p, f"```python\n{p.canonical_solution}\n```", mode="none") for p in problems}
    with Grader(workers) as grader:
        if failed := [r.problem.id for r in requests.values() if not grader.grade_one(r).gt_pass]:
            raise RunFault(f"the canonical solution of problem {failed[0]} does not pass: nothing to time")
        rows = []
        for problem in tqdm(problems, desc="rows", disable=None, leave=False):
            own = own_time(problem)
            count = repeats if own < SLOW_MS else 1
            # In turn row by row, each side in a row: a grader works through batches, and so does its competitor.
            ours, fresh = (
                statistics.median(_milliseconds(run) for _ in range(count))
                for run in (partial(grader.grade_one, requests[problem.id]), partial(run_fresh, program_of(problem)))
            )
            rows.append(Row(problem.id, own, ours, fresh))
        fast = [problem for problem, row in zip(problems, rows, strict=True) if row.own < FAST_MS]
        rates = _rates(grader, [requests[p.id] for p in fast], [program_of(p) for p in fast], workers, rounds)
    if not fast:
        return Report(tuple(rows), 0.0, 0.0, 0.0, 0, workers)
    ours, fresh = (statistics.median(side) for side in zip(*rates, strict=True))
    ratio = statistics.median(a / b for a, b in rates)
    return Report(tuple(rows), ours, fresh, ratio, len(fast), workers)


def _rates(
    grader: Grader, requests: list[GradeRequest], programs: list[str], workers: int, rounds: int
) -> list[tuple[float, float]]:
    """(completions per second of the grader, of fresh interpreters) for each round."""
    rates: list[tuple[float, float]] = []
    if not requests:
        return rates
    batch = requests * 4  # several times as long as the other side's, so that both last long enough to be timed
    with ThreadPoolExecutor(workers) as pool:
        for _ in tqdm(range(rounds), desc="batches", disable=None, leave=False):
            ours = len(batch) / (_milliseconds(partial(grader.grade, batch)) / 1e3)
            fresh = len(programs) / (_milliseconds(lambda: list(pool.map(run_fresh, programs))) / 1e3)
            rates.append((ours, fresh))
    return rates


def _milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def save_report(report: Report, path: Path) -> None:
    """All numbers, as JSON."""
    about = {"machine": machine(torch.device("cpu")), "code": code_version()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | asdict(report), indent=1) + "\n")


def format_report(report: Report) -> str:
    """The report in a few lines, each limit beside its figure."""
    quick = [row for row in report.rows if row.own < SLOW_MS]
    slow = [row for row in report.rows if row.own >= SLOW_MS]
    lines = []
    if quick:
        ours, fresh = (statistics.median(side) for side in zip(*(row.overheads for row in quick), strict=True))
        own = statistics.median(row.own for row in quick)
        lines += [
            f"{len(quick)} rows, median own run time {own:.2f} ms",
            f"overhead per grading, median: {ours:.2f} ms; a fresh interpreter: {fresh:.2f} ms; "
            f"ratio 1/{fresh / ours:.1f} (to hold: at most 1/{1 / MAX_OVERHEAD_SHARE:.0f} and {MAX_OVERHEAD_MS:g} ms)",
        ]
    if report.fast:
        lines.append(
            f"completions per second, {report.fast} rows under {FAST_MS:g} ms, {report.workers} workers: "
            f"{report.grader_rate:.0f}; fresh interpreters: {report.fresh_rate:.1f}; {report.rate_ratio:.1f} times "
            f"(to hold: at least {MIN_SPEEDUP:g})"
        )
    else:
        lines.append(f"no row's own run time is under {FAST_MS:g} ms: completions per second are not measured")
    if slow:
        mean = statistics.mean(row.own for row in slow)
        walls = [statistics.mean(side) for side in zip(*((row.grader, row.fresh) for row in slow), strict=True)]
        lines.append(
            f"{len(slow)} rows that are slow by themselves ({SLOW_MS:g} ms or more), apart: mean own run time "
            f"{mean:.0f} ms, graded in {walls[0]:.0f} ms, in a fresh interpreter {walls[1]:.0f} ms"
        )
    return "\n".join(lines)
