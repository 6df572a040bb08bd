"""The step log: one aligned row a step, the same as JSON lines, a progress bar, and a verdict at the end.

The columns are `step_columns.py`'s. Log lines go out through tqdm, so that they never tear the bar. Where standard
error is no terminal there is no bar, and the time left is printed above each header.

`metrics.jsonl` holds every number that was given, printed or not; a number that is not finite becomes null, with one
warning for its key. Left out on purpose: where the numbers come from (metrics are plain numbers; no torch here), and
experiment trackers.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from loguru import logger
from tqdm import tqdm

from projected_grpo.errors import InputError
from projected_grpo.paths import replacing
from projected_grpo.step_columns import RunKind, fit, format_row, header, legend

Metrics = dict[str, Any]
LAST = 5  # steps that the verdict averages over, as the published tables do


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
        level = "INFO" if os.environ.get("RANK", "0") == "0" else "ERROR"  # of several processes one speaks
        _console.append(logger.add(_write_above_bar, format=_line_format("HH:mm:ss"), level=level))


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
        logger.remove(self._file_handler)
        self._metrics_file.close()  # last: on a full disk it fails

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
        with replacing(self.metrics_path) as scratch:
            scratch.write_text("".join(line + "\n" for line in lines[:kept]), encoding="utf-8")
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
        rates = [fit(mean_of(part, key), ".2f", 12) for key in (hack, right) for part in (first, last)]
        lines.append(f"  {source:8} hack {rates[0]} -> {rates[1]}   pass {rates[2]} -> {rates[3]}")
    lines.append(f"           (means of the first {len(first)} -> the last {len(last)} steps)")
    cin, null, cout = (mean_of(rows, key) for key in ("cin", "cin_null", "cout"))
    times = f" ({cin / null:.1f} times)" if cin is not None and null else ""
    shown = [fit(share, ".3f", 12) for share in (cin, null, cout)]
    lines.append(f"  gradient cin {shown[0]} beside its null {shown[1]}{times}, cout {shown[2]} (means of all steps)")
    parts = [mean_of(rows, f"time/{part}") for part in ("step", "generation", "grading", "update")]
    step, generation, grading, update = (fit(part, ".2f", 12) for part in parts)
    lines.append(f"  seconds  {step} a step: generation {generation}, grading {grading}, update {update}")
    label_width = max((len(label) for label in files), default=0)
    for n, (label, path) in enumerate(files.items()):
        lines.append(f"  {'files' if n == 0 else '':8} {label:{label_width}}  {path}")
    lines.append(f"  next     {next_command}")
    return "\n".join(lines)
