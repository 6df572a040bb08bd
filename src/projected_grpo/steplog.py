"""The step log: one aligned row a step, the same as JSON lines, a progress bar, and a verdict at the end.

Everything about a column (its place, its width, what it is, what it should do in this run and what it means when it
does not) stands once, in `COLUMNS`; header, rows and legend are all made from that table. Log lines go out through
tqdm, so that they never tear the bar. Where standard error is no terminal there is no bar, and the time left is
printed above each header.

`metrics.jsonl` holds every number that was given, printed or not; a number that is not finite becomes null, with one
warning for its key. Left out on purpose: where the numbers come from (metrics are plain numbers; no torch here), and
experiment trackers.
"""

import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from loguru import logger
from tqdm import tqdm

from projected_grpo.errors import InputError

Metrics = dict[str, Any]
LAST = 5  # steps that the verdict averages over, as the published tables do


@dataclass(frozen=True)
class RunKind:
    """What decides what a column should show."""

    arm: str
    gate: str
    project_target: str

    @property
    def only_measures(self) -> bool:
        return self.arm in ("vanilla", "oracle")

    @property
    def touches_gradient(self) -> bool:
        return not self.only_measures and self.project_target in ("grad", "both")

    @property
    def touches_update(self) -> bool:
        return not self.only_measures and self.project_target in ("update", "both")

    @property
    def holds(self) -> bool:
        return not self.only_measures and self.project_target == "displacement"

    @property
    def is_control(self) -> bool:
        return self.arm not in ("vanilla", "projected")


@dataclass(frozen=True)
class Column:
    """A printed column. `key`: of the metrics row; `format`: a format spec; `expectation`: in words, of the run."""

    key: str
    header: str
    width: int
    format: str
    meaning: str
    expectation: str | Callable[[RunKind], str]

    def cell(self, value: float | int | None) -> str:
        """`value`, right-aligned, exactly `width` wide: "-" for None, fewer digits where it is too large or small."""
        return _fit(value, self.format, self.width).rjust(self.width)


def _fit(value: float | int | None, spec: str, width: int) -> str:
    if value is None:
        return "-"
    text = format(value, spec)
    vanished = math.isfinite(value) and value != 0 and float(text) == 0
    if len(text) <= width and not vanished:
        return text
    shorter = (format(float(value), f".{digits}g") for digits in (5, 4, 3, 2, 1))
    return next((text for text in shorter if len(text) <= width), "#" * width)


def _hack_s(run: RunKind) -> str:
    if run.arm == "vanilla":
        return "rises once the loophole is found; if it never does, the run is too short to show any arm's effect"
    if run.arm == "oracle":
        return "falls, as nothing pays for it; if it rises, the reward is not the ground truth"
    if run.is_control:
        return "rises about as in vanilla, perhaps later; if it stays low, the real basis is not what holds it down"
    return "stays below vanilla's at the same pass_s; if both fall together, the policy is breaking, not protected"


def _cin(run: RunKind) -> str:
    if run.arm.startswith("random"):
        return "beside its null, as the directions mean nothing; far from it, the control is no control"
    if run.arm.startswith("placebo"):
        return "above its null (honest pairs too point where gradients go); compare with cin of the real basis"
    return "well above its null; beside it, the basis means nothing for this gradient: stale (refresh it) or bad pairs"


def _cin_t(run: RunKind) -> str:
    if run.is_control and run.arm != "flipped":
        return "as cin_s; '-' without a teacher"
    return (
        "cin_t > cin_s throughout, as the teacher hacks more ('-' without a teacher); "
        "when not, the basis does not see the teacher's hacks: refresh it, look at the pairs"
    )


def _cout(run: RunKind) -> str:
    if run.only_measures:
        return "cout = cin, measured, not touched; anything else is a bug"
    if not run.touches_gradient:
        return "cout = cin, as the gradient is not projected; anything else is a bug"
    return (
        "near 0 at overshoot 1 (arithmetic, not evidence); when not, the projection is not running or is scaled down, "
        "or leaves the teacher's rows alone (--project-rows)"
    )


def _cup(run: RunKind) -> str:
    if run.only_measures:
        return "beside cin: what the optimiser makes of an untouched gradient; the other arms' cup is to be held to it"
    if run.touches_gradient:
        return "well below vanilla's; what is left is the optimiser's leak; if large, use --project-target both"
    if run.holds:
        return "as in vanilla at first; then what the optimiser would do from where δ is held"
    return "as in vanilla, as the gradient is not touched"


def _cup_out(run: RunKind) -> str:
    if run.touches_update:
        return "near 0 at overshoot 1; when not, the update projection is not running or is scaled down"
    if run.holds:
        return "below cup where δ had to be put back to its floor; hold/* in metrics.jsonl say how far and how often"
    return "cup_out = cup, as updates are not projected; anything else is a bug"


def _fired(run: RunKind) -> str:
    expected = "1" if run.gate == "no_gate" else "about 1 - 2^-k for k axes a module, even on noise"
    return f"{expected}; 0 means no gradient at all (every group agrees)"


def _vd(run: RunKind) -> str:
    if run.arm == "vanilla":
        return "sinks below 0 as hacking is learnt; near 0 while it is not"
    if run.arm == "oracle":
        return "near 0, or above where honesty is learnt along the basis"
    if run.holds:
        return "at its floor or above (no_gate: at it), see --hold-rate; if pass_s sinks as it rises, lower the rate"
    if run.gate == "no_gate" and run.touches_update:
        return "stays where it is; when it moves, the update projection is not running"
    if run.gate == "no_gate":
        return "stays near 0; when it sinks, the optimiser leaks what the gradient no longer holds"
    return "rises slowly: the drift that Adam makes of one-sided noise, which can cost pass_s; if it sinks, hacks leak"


def _pass_s(run: RunKind) -> str:
    if run.arm == "vanilla":
        return "holds or rises; the level that every other arm is to be matched to"
    return "holds or rises, within 0.10 of vanilla's; below that, a lower hack_s proves nothing"


# fmt: off
COLUMNS: tuple[Column, ...] = (
    Column("step", "step", 6, "d", "optimiser steps done",
           "one row for each, none twice"),
    Column("reward", "reward", 7, ".3f", "mean reward of all rows, student's and teacher's",
           "rises; flat from the start: every group agrees, and nothing is learnt"),
    Column("hack_student", "hack_s", 6, ".2f", "share of the student's completions that hack", _hack_s),
    Column("pass_student", "pass_s", 6, ".2f", "share of the student's completions that are right", _pass_s),
    Column("hack_teacher", "hack_t", 6, ".2f", "hack_s of the cached teacher rows",
           "the pool's own rate at every step ('-' without a teacher); a trend: the draw from the pool is off"),
    Column("pass_teacher", "pass_t", 6, ".2f", "pass_s of the cached teacher rows",
           "as hack_t, the pool's own rate"),
    Column("loss", "loss", 9, ".4f", "GRPO loss",
           "small; its level says nothing, and NaN ends the run"),
    Column("grad_norm", "gnorm", 8, ".4f", "norm of the gradient of δ before clipping and projection",
           "above 0; 0 where every group agrees, and then the ratios are '-'"),
    Column("cin_s", "cin_s", 7, ".3f", "cin of the student's rows alone", _cin),
    Column("cin_t", "cin_t", 6, ".3f", "cin of the teacher's rows alone", _cin_t),
    Column("cin", "cin", 6, ".3f", "hack-ward share of the gradient's norm before the projection", _cin),
    Column("cin_null", "null", 6, ".3f", "what cin would be for directions without meaning",
           "slow to change; cin means nothing but beside it"),
    Column("cout", "cout", 7, ".3f", "cin after the projection", _cout),
    Column("cup_in", "cup", 7, ".3f", "hack-ward share of the optimiser's update, before its projection", _cup),
    Column("cup_out", "cup_out", 7, ".3f", "cup after the update projection", _cup_out),
    Column("fired", "fired", 6, ".2f", "share of the modules where the gate has something to take out", _fired),
    Column("v_delta", "vd", 8, ".4f", "mean V δ, where δ stands along V; below 0 is hack-ward", _vd),
    Column("time/generation", "t_gen", 7, ".1f", "seconds of generation",
           "most of a step; grows with the completions' length"),
    Column("time/grading", "t_grade", 7, ".2f", "seconds of grading",
           "well below t_gen; when not, completions run into the limits or there are too few workers"),
    Column("time/update", "t_update", 8, ".1f", "seconds of the rest: loss, gradients, projection, optimiser",
           "steady; refreshing the basis and measuring rollouts are apart, as time/refresh and time/rollout_grads"),
)
# fmt: on


def header() -> str:
    """The line above the rows."""
    return " ".join(column.header.rjust(column.width) for column in COLUMNS)


def format_row(metrics: Mapping[str, Any]) -> str:
    """One row, as wide as the header; a key that is missing or None is "-"."""
    return " ".join(column.cell(metrics.get(column.key)) for column in COLUMNS)


def legend(run: RunKind, width: int = 175) -> list[str]:
    """What each column is, then what it should do in this run and what it means when it does not."""
    lines = [f"columns of this run (arm {run.arm}, gate {run.gate}, project target {run.project_target}):"]
    for column in COLUMNS:
        expected = column.expectation if isinstance(column.expectation, str) else column.expectation(run)
        text = f"{column.meaning}; here: {expected}"
        lines += textwrap.wrap(text, width, initial_indent=f"{column.header:>9}  ", subsequent_indent=" " * 11)
    return lines


def read_metrics(path: Path) -> list[Metrics]:
    """All rows of a `metrics.jsonl`. Raises InputError with file and line for one that is torn or out of order."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the metrics.jsonl of a run's folder")
    if path.stat().st_size == 0:
        return []
    return _parse(path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n"), path)


def _parse(lines: list[str], path: Path) -> list[Metrics]:
    rows: list[Metrics] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not JSON ({error}); if it is the last line, delete it") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise InputError(f'{path}:{number}: not a row of metrics; it needs an object with a whole "step"')
        if rows and row["step"] <= rows[-1]["step"]:
            raise InputError(f"{path}:{number}: step {row['step']} after step {rows[-1]['step']}; steps must increase")
        rows.append(row)
    return rows


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is written null here")


def _line_format(when: str) -> Callable[[Any], str]:
    def line(record: Any) -> str:
        level = "" if record["level"].no < 30 else "{level.name}: "
        return f"{{time:{when}}} {level}{{message}}\n{{exception}}"

    return line


def _write_above_bar(message: str) -> None:
    tqdm.write(message, file=sys.stderr, end="")


_console: list[int] = []  # loguru's logger is one for the process, and so is the handler that we give it


def setup_console() -> None:
    """Send loguru's lines to standard error, above any progress bar, instead of by its default handler. Idempotent."""
    if not _console:
        with suppress(ValueError):  # somebody may have taken the default handler off already
            logger.remove(0)
        _console.append(logger.add(_write_above_bar, format=_line_format("HH:mm:ss"), level="INFO"))


class StepLog:
    """The log of one run, as a context manager: `train.log` and `metrics.jsonl` in `run_dir`, and the terminal.

    `start_step`: steps already done, on resume; rows of later steps in `metrics.jsonl` are dropped, since these steps
    are run again, and so is a last line that a kill has torn. `train.log` only ever grows.
    """

    def __init__(
        self,
        run_dir: Path,
        arm: str,
        gate: str,
        project_target: str,
        total_steps: int,
        header_every: int = 20,
        start_step: int = 0,
    ) -> None:
        self.run = RunKind(arm, gate, project_target)
        self.total_steps = total_steps
        self.header_every = header_every
        self.start_step = start_step
        self.metrics_path = Path(run_dir) / "metrics.jsonl"
        self.log_path = Path(run_dir) / "train.log"
        self._rows_printed = 0
        self._warned: set[str] = set()

    def __enter__(self) -> "StepLog":
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        kept, dropped = self._rewind_metrics()
        setup_console()
        self._file_handler = logger.add(
            self.log_path, format=_line_format("YYYY-MM-DD HH:mm:ss"), level="INFO", encoding="utf-8"
        )
        self._metrics_file = self.metrics_path.open("a", encoding="utf-8")
        if dropped:
            logger.info(f"dropped {dropped} rows of steps after {self.start_step}, which are run again")
        if kept < self.start_step:
            logger.warning(f"{self.metrics_path}: {kept} rows for the {self.start_step} steps already done")
        for line in legend(self.run):
            logger.info(line)
        # disable=None: no bar where standard error is no terminal
        look = {"bar_format": "{l_bar}{bar:40}{r_bar}", "dynamic_ncols": True, "mininterval": 0, "disable": None}
        total, done = self.total_steps, self.start_step
        self._bar = tqdm(total=total, initial=done, desc=self.run.arm, unit="step", file=sys.stderr, **look)
        self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._metrics_file.close()
        logger.remove(self._file_handler)

    def row(self, metrics: Mapping[str, Any]) -> None:
        """Print one step's row and append all of `metrics` (it needs "step") to `metrics.jsonl`."""
        line = json.dumps({key: self._finite(key, value) for key, value in metrics.items()}, allow_nan=False)
        self._metrics_file.write(line + "\n")
        self._metrics_file.flush()
        if self._rows_printed % self.header_every == 0:
            if self._rows_printed:
                logger.info(self._time_left(metrics["step"]))
            logger.info(header())
        logger.info(format_row(metrics))
        self._rows_printed += 1
        self._bar.update(metrics["step"] - self._bar.n)

    def verdict(self, files: Mapping[str, Path], next_command: str) -> str:
        """Print and return the short summary of the whole run, of all rows in `metrics.jsonl`, resumed ones included.

        `files`: what to name under "files", by a short label. `next_command`: what to type next.
        """
        self._bar.close()
        text = format_verdict(read_metrics(self.metrics_path), self.run, self.total_steps, files, next_command)
        for line in text.splitlines():
            logger.info(line)
        return text

    def _finite(self, key: str, value: Any) -> Any:
        """`value` with every number that is not finite replaced by None."""
        if isinstance(value, dict):
            return {name: self._finite(f"{key}.{name}", item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._finite(key, item) for item in value]
        if not isinstance(value, float) or math.isfinite(value):
            return value
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(f"metric {key!r} is {value}; it is written as null (said once)")
        return None

    def _time_left(self, step: int) -> str:
        pace = (time.monotonic() - self._started) / max(step - self.start_step, 1)
        minutes = round(pace * (self.total_steps - step) / 60)
        left = f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
        return f"{self.run.arm}: step {step} of {self.total_steps}, {pace:.1f} s a step, about {left} left"

    def _rewind_metrics(self) -> tuple[int, int]:
        """Rewrite `metrics.jsonl`, in one go, up to `start_step`; the numbers of rows kept and dropped."""
        if not self.metrics_path.exists():
            return 0, 0
        *lines, torn = self.metrics_path.read_text(encoding="utf-8", errors="replace").split("\n")
        rows = _parse(lines, self.metrics_path)
        kept = sum(row["step"] <= self.start_step for row in rows)
        scratch = self.metrics_path.with_suffix(".tmp")
        scratch.write_text("".join(line + "\n" for line in lines[:kept]), encoding="utf-8")
        os.replace(scratch, self.metrics_path)
        return kept, len(rows) - kept + bool(torn)


def mean_of(rows: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """Over the rows in which the key has a value; None without one."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def format_verdict(
    rows: list[Metrics], run: RunKind, total_steps: int, files: Mapping[str, Path], next_command: str
) -> str:
    """The verdict as text: rates of the first and of the last five steps, cin beside its null, seconds, files, next."""
    lines = [f"verdict: {run.arm}, {run.gate}, target {run.project_target}: {len(rows)} of {total_steps} steps"]
    first, last = rows[:LAST], rows[-LAST:]
    for source in ("student", "teacher"):
        hack, right = f"hack_{source}", f"pass_{source}"
        if mean_of(rows, hack) is None:
            continue
        rates = [_fit(mean_of(part, key), ".2f", 12) for key in (hack, right) for part in (first, last)]
        lines.append(f"  {source:8} hack {rates[0]} -> {rates[1]}   pass {rates[2]} -> {rates[3]}")
    lines.append(f"           (means of the first {len(first)} -> the last {len(last)} steps)")
    cin, null, cout = (mean_of(rows, key) for key in ("cin", "cin_null", "cout"))
    times = f" ({cin / null:.1f} times)" if cin is not None and null else ""
    shown = [_fit(share, ".3f", 12) for share in (cin, null, cout)]
    lines.append(f"  gradient cin {shown[0]} beside its null {shown[1]}{times}, cout {shown[2]} (means of all steps)")
    parts = [mean_of(rows, f"time/{part}") for part in ("step", "generation", "grading", "update")]
    step, generation, grading, update = (_fit(part, ".2f", 12) for part in parts)
    lines.append(f"  seconds  {step} a step: generation {generation}, grading {grading}, update {update}")
    label_width = max((len(label) for label in files), default=0)
    for n, (label, path) in enumerate(files.items()):
        lines.append(f"  {'files' if n == 0 else '':8} {label:{label_width}}  {path}")
    lines.append(f"  next     {next_command}")
    return "\n".join(lines)
