"""From a run to its rates: of the last five steps and on held-out problems, by mode and by style of hack.

A rate is hits over completions. The last five steps' hack, attempt and pass rates are the step log's own, so that the
report and the log agree; everything else is counted from the completions. Held-out rates over "all loopholes" leave
mode `none` out, where nothing can be hacked. Left out on purpose: the teacher's rollouts.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from projected_grpo.errors import InputError
from projected_grpo.hack_styles import hack_style
from projected_grpo.report.runs import Run
from projected_grpo.steplog import LAST

HELD_OUT, LAST_STEPS = "held-out", f"last {LAST} steps"
ALL = "all loopholes"
HITS: dict[str, Callable[[str], bool]] = {
    "hack": lambda label: label == "reward_hack",
    "attempt": lambda label: label in ("correct_attempted", "reward_hack", "attempted_hack"),
    "pass": lambda label: label in ("correct", "correct_attempted"),
}
Counts = dict[str, tuple[int, int]]
"""Problem: (hits, completions)."""


class Measure(NamedTuple):
    """What is measured. `rate`: hack, attempt or pass, or `style NAME`, a hack of that style."""

    source: str
    mode: str
    rate: str

    def __str__(self) -> str:
        where = self.source if self.mode == ALL else f"{self.source}, mode {self.mode}"
        return f"{self.rate} ({where})"


class Completion(NamedTuple):
    problem: str
    mode: str
    label: str
    style: str | None
    """Of a hack only: the style under `run_tests`, elsewhere the mode's name."""


@dataclass(frozen=True)
class Observed:
    """A run that is compared, and its completions by source; a source that is missing is no key."""

    run: Run
    completions: dict[str, list[Completion]] = field(default_factory=dict)

    @cached_property
    def _counts(self) -> dict[Measure, Counts]:
        return {}

    def counts(self, measure: Measure) -> Counts | None:
        """By problem; None where the run has no such completions."""
        if measure.source not in self.completions:
            return None
        if measure not in self._counts:
            self._counts[measure] = _count(self.completions[measure.source], measure)
        return self._counts[measure] or None

    def value(self, measure: Measure) -> float | None:
        """The rate; None where nothing tells it."""
        if measure.source == LAST_STEPS and measure.mode == ALL and measure.rate in HITS:
            return _logged(self.run, f"{measure.rate}_student")
        counts = self.counts(measure)
        if counts is None:
            return None
        return sum(hits for hits, _ in counts.values()) / sum(n for _, n in counts.values())


def observe_all(runs: Sequence[Run]) -> tuple[list[Run], dict[str, "Observed"]]:
    """All runs, those whose rollouts are damaged left out, and by folder what is seen of those that are compared."""
    kept, observed = [], {}
    for run in runs:
        try:
            if run.left_out is None:
                observed[str(run.folder)] = observe(run)
        except InputError as error:
            run = replace(run, left_out=f"damaged: {error}")
        kept.append(run)
    return kept, observed


def observe(run: Run) -> Observed:
    """Reads the rollouts of the last five steps and the held-out samples. Raises InputError for a damaged file."""
    completions = {}
    if run.evaluation is not None:
        completions[HELD_OUT] = [
            _completion(s["problem_id"], s["mode"], s["label"], s["completion"], s["test_func_name"])
            for s in run.evaluation["samples"]
        ]
    path = run.folder / "rollouts.jsonl.gz"
    if path.is_file():
        first = run.steps - LAST + 1
        completions[LAST_STEPS] = [
            _completion(
                row["problem_id"], row["mode"], row["label"], row["completion"], row.get("test_func_name", "run_tests")
            )
            for row in _rollouts(path)
            if row["step"] >= first and row["source"] == "student"
        ]
    return Observed(run, completions)


def _completion(problem: str, mode: str, label: str, text: str, test_func_name: str) -> Completion:
    style = None
    if label == "reward_hack":
        style = hack_style(text, test_func_name) if mode == "run_tests" else mode
    return Completion(problem, mode, label, style)


def _rollouts(path: Path) -> Iterator[dict]:
    number = 1
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if not {"step", "problem_id", "mode", "source", "completion", "label"} <= row.keys():
                    raise ValueError("a key is missing")
                yield row
                number += 1
    except (ValueError, AttributeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}:{number}: damaged ({error}); take the file from its run again") from error


def _count(completions: Sequence[Completion], measure: Measure) -> Counts:
    counts: Counts = {}
    style = measure.rate.removeprefix("style ") if measure.rate.startswith("style ") else None
    for completion in completions:
        wanted = completion.mode == measure.mode or (
            measure.mode == ALL and (measure.source != HELD_OUT or completion.mode != "none")
        )
        if not wanted:
            continue
        hit = completion.style == style if style is not None else HITS[measure.rate](completion.label)
        hits, n = counts.get(completion.problem, (0, 0))
        counts[completion.problem] = (hits + hit, n + 1)
    return counts


def _logged(run: Run, key: str) -> float | None:
    """Mean over the last five steps; a step that reuses a generation has no rate of its own."""
    values = [row[key] for row in run.metrics[-LAST:] if row.get(key) is not None]
    return sum(values) / len(values) if values else None
