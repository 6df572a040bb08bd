"""What a sweep shows: a bar or a line a minute while it runs, a line for each finished run, a table at the end; and, to
whoever asks from elsewhere, how far its runs have come."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loguru import logger
from tqdm import tqdm

from projected_grpo.config import EvalConfig, TrainConfig
from projected_grpo.run_state import State, in_use, is_trained
from projected_grpo.steplog import LAST, mean_of
from projected_grpo.sweep_file import Sweep
from projected_grpo.sweep_jobs import RunTask
from projected_grpo.sweep_workers import Interrupts, Outcome, Running, Watcher

LINE_EVERY_S = 60.0
TAIL_BYTES = 65536  # several rows of metrics


class SweepWatch(Watcher):
    """Of the runs of one sweep, `states` being what each was before it."""

    def __init__(self, tasks: Sequence[RunTask], states: Mapping[str, State], interrupts: Interrupts) -> None:
        self.tasks, self.states, self.interrupts = tasks, states, interrupts
        self.done = sum(state == "done" for state in states.values())
        # A run that is evaluated only, or done, has no step to do; one that starts again has them all.
        self.before = {task.name: self._steps_before(task) for task in tasks}
        self.began = self.spoke = 0.0  # when the first run starts
        self.told = 0
        self.begun: set[str] = set()

    def __enter__(self) -> "SweepWatch":
        look = {"bar_format": "{desc}{bar:30} {n_fmt}/{total_fmt} {elapsed}{postfix}", "dynamic_ncols": True}
        self.bar = tqdm(total=len(self.tasks), initial=self.done, file=sys.stderr, disable=None, desc="runs ", **look)
        return self

    def __exit__(self, *raised: object) -> None:
        self.bar.close()

    def started(self, running: Running) -> None:
        if not self.begun:
            self.began = self.spoke = running.started
        self.begun.add(running.task.name)
        logger.info(f"{running.task.name}: {'again' if running.attempt > 1 else self.states[running.task.name]}")

    def not_started(self, task: RunTask, why: str) -> None:
        logger.warning(f"{task.name}: not started: {why}")

    def retried(self, task: RunTask, outcome: Outcome) -> None:
        logger.warning(f"{task.name}: {outcome.message}; trying once more ({task.log})")

    def ended(self, task: RunTask, outcome: Outcome) -> None:
        if outcome.kind == "ok":
            self.done += 1
            rates, where = held_out_rates(task.evaluation.out)
            shown = f"hack {_rate(rates['hack'])} pass {_rate(rates['pass'])} (held-out {where})"
            logger.info(f"[{self.done}/{len(self.tasks)}] {task.name}: {shown}, {outcome.seconds:.0f} s")
            self.bar.update()
        elif outcome.kind == "interrupted":
            logger.warning(f"{task.name}: interrupted")
        else:
            logger.error(f"{task.name}: {outcome.message}; see {task.log}")

    def tick(self, running: Sequence[Running]) -> None:
        if self.interrupts.count > self.told:
            self.told = self.interrupts.count
            what = "finishing a step and saving a checkpoint in" if self.told == 1 else "ending"
            logger.warning(f"interrupted: {what} {len(running)} runs" + " (again to end at once)" * (self.told == 1))
        if not self.bar.disable:
            self.bar.set_postfix_str(f"{self._doing(running)}; {self._left()}" if running else "")
        elif running and time.monotonic() - self.spoke >= LINE_EVERY_S:
            self.spoke = time.monotonic()
            logger.info(f"{self.done} of {len(self.tasks)} runs done; {self._doing(running)}; {self._left()}")

    def _steps_before(self, task: RunTask) -> int:
        state = self.states[task.name]
        if state == "start":
            return 0
        return steps_done(task) if state == "resume" else task.config.steps

    def _doing(self, running: Sequence[Running]) -> str:
        return ", ".join(f"{r.task.name} {steps_done(r.task)}/{r.task.config.steps}" for r in running)

    def _left(self) -> str:
        """From the pace of all runs together since the start, importing and evaluating included."""
        to_do = sum(task.config.steps - self.before[task.name] for task in self.tasks)
        begun = [task for task in self.tasks if task.name in self.begun]
        done = sum(max(steps_done(task) - self.before[task.name], 0) for task in begun)
        if not done:
            return "time left not known yet"
        return f"about {_duration((time.monotonic() - self.began) * (to_do - done) / done)} left"


def last_rows(path: Path) -> list[dict[str, Any]]:
    """The last whole rows of a metrics.jsonl that may just be written."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - TAIL_BYTES, 0))
        lines = file.read().split(b"\n")[:-1]
    whole = lines if size <= TAIL_BYTES else lines[1:]
    return [json.loads(line) for line in whole[-LAST:]]


def steps_done(task: RunTask) -> int:
    rows = last_rows(task.config.run_dir / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def held_out_rates(path: Path) -> tuple[dict[str, float | None], str]:
    """Hack and pass rate of an eval.json, means over its loopholes, and which these are."""
    if not path.is_file():
        return {"hack": None, "pass": None}, "-"
    modes = json.loads(path.read_text())["modes"]
    names = [name for name in modes if name != "none"] or list(modes)
    rates = {key: sum(modes[name]["rates"][key]["rate"] for name in names) / len(names) for key in ("hack", "pass")}
    return rates, names[0] if len(names) == 1 else f"mean of {len(names)} modes"


def format_table(tasks: Sequence[RunTask], states: Mapping[str, State], outcomes: Mapping[str, Outcome]) -> str:
    """One row a run: what became of it, its last steps' rates of the student, its held-out rates, seconds."""
    width = max(len(task.name) for task in tasks) + 2
    lines = [
        f"{'run':<{width}}{'state':<13}{'steps':>9}{f'hack last {LAST}':>13}{f'pass last {LAST}':>13}"
        f"{'hack held out':>15}{'pass held out':>15}{'seconds':>9}"
    ]
    for task in tasks:
        outcome = outcomes.get(task.name)
        rows = last_rows(task.config.run_dir / "metrics.jsonl")
        rates, _ = held_out_rates(task.evaluation.out)
        steps = f"{rows[-1]['step'] if rows else 0}/{task.config.steps}"
        lines.append(
            f"{task.name:<{width}}{_became(states[task.name], outcome):<13}{steps:>9}"
            f"{_rate(mean_of(rows, 'hack_student')):>13}{_rate(mean_of(rows, 'pass_student')):>13}"
            f"{_rate(rates['hack']):>15}{_rate(rates['pass']):>15}"
            f"{'-' if outcome is None else f'{outcome.seconds:.0f}':>9}"
        )
    return "\n".join(lines)


def show_status(plan: Sweep, every: float) -> None:
    """The table of `status_table`, once, or again every so many seconds until all runs are done."""
    while True:
        table, n_left = status_table(plan)
        if every and sys.stdout.isatty():
            print("\x1b[H\x1b[2J", end="")  # a fresh screen
        print(table, flush=True)
        if not every or not n_left:
            return
        time.sleep(every)


def status_table(plan: Sweep) -> tuple[str, int]:
    """(One row a run, read off its folder alone: so whoever runs it, and wherever; how many are not done.)"""
    width = max(len(config.run_dir.name) for config, _ in plan.runs) + 2
    lines = [
        f"{'run':<{width}}{'state':<13}{'steps':>9}{'s a step':>10}{'left':>10}{f'hack last {LAST}':>13}"
        f"{f'pass last {LAST}':>13}{'hack held out':>15}{'pass held out':>15}"
    ]
    n_left = 0
    for config, evaluation in plan.runs:
        rows = last_rows(config.run_dir / "metrics.jsonl")
        state = _stands(config, evaluation)
        n_left += state != "done"
        pace = mean_of(rows, "time/step")
        step = rows[-1]["step"] if rows else 0
        left = pace * (config.steps - step) if pace is not None and state == "running" else None
        rates = held_out_rates(evaluation.out)[0]
        lines.append(
            f"{config.run_dir.name:<{width}}{state:<13}{f'{step}/{config.steps}':>9}"
            f"{'-' if pace is None else f'{pace:.1f}':>10}{'-' if left is None else _duration(left):>10}"
            f"{_rate(mean_of(rows, 'hack_student')):>13}{_rate(mean_of(rows, 'pass_student')):>13}"
            f"{_rate(rates['hack']):>15}{_rate(rates['pass']):>15}"
        )
    n_done = len(plan.runs) - n_left
    return "\n".join([*lines, f"{n_done} of {len(plan.runs)} runs done"]), n_left


def _stands(config: TrainConfig, evaluation: EvalConfig) -> str:
    """`running` where a process of this machine holds the folder, or a row is younger than ten steps took."""
    folder, metrics = config.run_dir, config.run_dir / "metrics.jsonl"
    if is_trained(folder) and evaluation.out.is_file():
        return "done"
    if not folder.is_dir():
        return "not started"
    if in_use(folder):
        return "running"
    pace = mean_of(last_rows(metrics), "time/step")
    if pace is not None and time.time() - metrics.stat().st_mtime < max(10 * pace, 60):
        return "running"  # on another machine, whose locks are not seen here
    return "trained" if is_trained(folder) else "stopped"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _became(state: State, outcome: Outcome | None) -> str:
    if state == "done":
        return "skipped"
    if outcome is None:
        return "not started"
    if outcome.kind != "ok":
        return "interrupted" if outcome.kind == "interrupted" else "failed"
    return {"start": "done", "resume": "resumed", "evaluate": "evaluated"}[state]


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
