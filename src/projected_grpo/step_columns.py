"""The step log's columns: place, width, what each is, what it should do in this run and what it means when it does not.

Everything about a column stands once, in `COLUMNS`; header, rows and legend are all made from that table.
"""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SOURCES = ("student", "teacher")


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
        return self.arm not in ("vanilla", "projected", "held")


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
        return fit(value, self.format, self.width).rjust(self.width)


def fit(value: float | int | None, spec: str, width: int) -> str:
    """`value` by the format spec, with fewer digits where that is too wide; "-" for None."""
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


def rates_of(rows: Sequence[dict]) -> dict[str, float | None]:
    """Rewards and rates, each source apart; None for a source without rows."""

    def mean(values: list) -> float | None:
        return sum(values) / len(values) if values else None

    rates = {"reward": mean([row["reward"] for row in rows])}
    for source in SOURCES:
        own = [row for row in rows if row["source"] == source]
        rates |= {
            f"reward_{source}": mean([row["reward"] for row in own]),
            f"hack_{source}": mean([row["label"] == "reward_hack" for row in own]),
            f"pass_{source}": mean([row["gt_pass"] for row in own]),
            f"attempt_{source}": mean([row["attempted"] for row in own]),
        }
    return rates
