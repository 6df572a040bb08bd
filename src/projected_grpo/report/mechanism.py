"""What moved along the real basis, whatever an arm projected, and what the first steps told of a run's end.

The measuring stick is one real basis of the untouched model: vanilla's, or else the first arm's that has one. Left out
on purpose: causes. A run may move along the basis and hack little for a third reason.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from scipy import stats

from projected_grpo.report.compare import BOOTSTRAP_SEED, Study, summarise
from projected_grpo.report.runs import Run
from projected_grpo.report.settings import runs_of
from projected_grpo.report.table import NONE, Table, p_value, percent
from projected_grpo.steplog import Metrics

EARLY = 20
"""Steps that count as early; a run has to be twice as long."""
FEWEST = 4  # runs of an arm: of three, any order is likely
DRAWS = 10_000
Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Displacement:
    """Of a finished run's δ over all modules together."""

    along: float
    """Mean of V δ over all kept axes of the real basis; hack-ward is below 0."""
    in_span: float
    """‖V δ‖² / ‖δ‖² over the modules of the basis."""
    norm: float
    """‖δ‖ over the modules of the basis."""


def displacements(study: Study) -> dict[str, Displacement]:
    """By run folder; a run without an adapter over the very factors of the basis is not in it."""
    sticks: dict[str, tuple[Weights, Weights] | None] = {}  # a sweep may have a base model for each seed
    found = {}
    for arm in study.arms.values():
        for run in runs_of(arm):
            if run.base_model not in sticks:
                sticks[run.base_model] = _measuring_stick(study, run.base_model)
            stick = sticks[run.base_model]
            if stick is not None and (one := _displacement(run, *stick)) is not None:
                found[str(run.folder)] = one
    return found


def _measuring_stick(study: Study, base_model: str) -> tuple[Weights, Weights] | None:
    """(directions, fingerprints) by module, of the real basis of a base model."""
    arms = sorted(study.arms.values(), key=lambda arm: arm is not study.vanilla)
    for run in (run for arm in arms for run in runs_of(arm) if run.base_model == base_model):
        if run.basis_info.get("kind") == "real" and not run.basis_info.get("delta_norm"):
            try:
                tensors = _tensors(run.folder / "basis.safetensors", "directions/", "fingerprints/")
            except (OSError, SafetensorError):
                continue
            directions, prints = (
                {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)}
                for part in ("directions/", "fingerprints/")
            )
            if directions:
                return directions, prints
    return None


def _displacement(run: Run, directions: Weights, prints: Weights) -> Displacement | None:
    try:
        adapter = _tensors(run.folder / "adapter" / "adapter_model.safetensors", "base_model.model.")
    except (OSError, SafetensorError):
        return None
    along, energy = [], 0.0
    for name, v in directions.items():
        delta = adapter.get(f"base_model.model.{name}.delta_s")
        ours = adapter.get(f"base_model.model.{name}.delta_s_fingerprint")
        if delta is None or delta.shape != v.shape[1:] or not np.array_equal(ours, prints.get(name)):
            return None
        along.append(v.astype(float) @ delta)
        energy += float(np.square(delta, dtype=float).sum())
    c = np.concatenate(along)
    share = float(np.square(c).sum()) / energy if energy else 0.0
    return Displacement(float(c.mean()), share, energy**0.5)


def _tensors(path: Path, *beginnings: str) -> Weights:
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(beginnings)}  # noqa: SIM118


def displacement_table(study: Study, moved: dict[str, Displacement]) -> Table | None:
    """A row an arm; None where no run tells."""
    rows, unmeasured = [], []
    for arm in study.arms.values():
        unmeasured += [f"{run.name} s{run.seed}" for run in runs_of(arm) if str(run.folder) not in moved]
        those = [moved[str(run.folder)] for run in runs_of(arm) if str(run.folder) in moved]
        if not those:
            continue
        along = [one.along for one in those]
        spread = f"{min(along):+.2f} to {max(along):+.2f}" if len(along) > 1 else NONE
        share, norm = np.mean([one.in_span for one in those]), np.mean([one.norm for one in those])
        cells = [arm.name, str(len(those)), f"{np.mean(along):+.2f}", spread, percent(float(share)), f"{norm:.2f}"]
        rows.append(cells + [percent(summarise(arm, study.main(rate)).mean) for rate in ("hack", "pass")])
    if not rows:
        return None
    hack = study.main("hack")
    head = ["arm", "n", "mean V δ", "over runs", "of ‖δ‖² in the span", "‖δ‖", "hack", "pass"]
    notes = [
        "δ at the end of a run along the real basis of the untouched model, whatever the arm projected; below 0 is "
        f"hack-ward. Hack and pass: per cent, {hack.source}.",
        *([f"Without an adapter over that basis's factors: {', '.join(unmeasured)}."] if unmeasured else []),
    ]
    return Table("displacement", "Where δ ends along the real basis", head, rows, notes)


def step_table(study: Study) -> Table | None:
    """What the optimiser makes of the projected gradient, over all steps; None where no run logged it."""
    rows = []
    for arm in study.arms.values():
        runs = runs_of(arm)
        if not any(row.get("v_delta") is not None for run in runs for row in run.metrics):
            continue
        shares = [_over_runs(runs, _over(key)) for key in STEP_SHARES]
        own = _over_runs(runs, lambda metrics: metrics[-1].get("v_delta"))
        cells = [NONE if share is None else f"{share:.3f}" for share in shares]
        cells.append(NONE if own is None else f"{own:+.2f}")
        rows.append([arm.name, str(len(runs)), _kept(runs), *cells])
    if not rows:
        return None
    head = ["arm", "n", "axes", "cin", "null", "cout", "cup", "its null", "cup_out", "away", "own V δ"]
    notes = [
        "Means over all steps and runs, along the arm's own basis: the hack-ward share of the gradient before and "
        "after its projection, of the optimiser's step before and after what is done to it, and the share of that "
        "step that leads away from hacking; V δ at the end along the last basis. Axes: kept, in how many modules. "
        "What a one-sided gate makes of directions without meaning is in the rows of the random arms.",
    ]
    return Table("steps", "What the optimiser makes of the gradient", head, rows, notes)


STEP_SHARES = ("cin", "cin_null", "cout", "cup_in", "cup_null", "cup_out", "cup_away")


def _kept(runs: Sequence[Run]) -> str:
    found = set()
    for run in runs:
        try:
            kept = _tensors(run.folder / "basis.safetensors", "singular_values/")
        except (OSError, SafetensorError):
            continue
        found.add(f"{sum(map(len, kept.values()))} in {len(kept)}")
    return "; ".join(sorted(found)) if 0 < len(found) < 3 else "differ" if found else NONE


def _over_runs(runs: Sequence[Run], of: Callable[[Sequence[Metrics]], float | None]) -> float | None:
    values = [value for run in runs if run.metrics and (value := of(run.metrics)) is not None]
    return float(np.mean(values)) if values else None


def _over(key: str, norm: str | None = None) -> Callable[[Sequence[Metrics]], float | None]:
    def mean(rows: Sequence[Metrics]) -> float | None:
        values = [
            row[key] / (row[norm] if norm else 1.0)
            for row in rows
            if row.get(key) is not None and (norm is None or row.get(norm))
        ]
        return float(np.mean(values)) if values else None

    return mean


PREDICTORS: dict[str, Callable[[Sequence[Metrics]], float | None]] = {
    "hack rate": _over("hack_student"),
    "pass rate": _over("pass_student"),
    "cin_s": _over("cin_s"),
    "cin_s / null": _over("cin_s", "cin_null"),
    "AUROC of the rollouts' gradients": _over("rollout/auroc"),
    "V δ at the last of them": lambda rows: rows[-1].get("v_delta") if rows else None,
    "norm of the gradient": _over("grad_norm"),
}
"""Of the rows of the first EARLY steps."""


@dataclass(frozen=True)
class Predicted:
    """Rank correlation of an early figure with a run's outcome, within arms."""

    predictor: str
    outcome: str
    by_arm: dict[str, tuple[float, int]]
    """Spearman's ρ and the number of runs."""
    pooled: float | None
    p: float | None
    """Two-sided, of shuffling seeds; None, as `pooled`, where the arms have too few seeds in common."""
    n_seeds: int


def predictions(study: Study) -> list[Predicted]:
    """Of every predictor and of the hack and the pass rate; empty where runs are too short or too few."""
    if any(run.steps < 2 * EARLY for arm in study.arms.values() for run in runs_of(arm)):
        return []
    found = []
    for rate in ("hack", "pass"):
        measure = study.main(rate)
        for name, early in PREDICTORS.items():
            groups: dict[str, dict[int, tuple[float, float]]] = {}
            for arm in study.arms.values():
                outcomes = arm.values(measure)
                firsts = {seed: early(one.run.metrics[:EARLY]) for seed, one in arm.runs.items() if seed in outcomes}
                points = {seed: (first, outcomes[seed]) for seed, first in firsts.items() if first is not None}
                if len(points) >= FEWEST and all(len(set(values)) > 1 for values in zip(*points.values(), strict=True)):
                    groups[arm.name] = points
            if groups:
                by_arm = {
                    arm: (float(stats.spearmanr(list(points.values())).statistic), len(points))
                    for arm, points in groups.items()
                }
                seeds = sorted(set.intersection(*(set(points) for points in groups.values())))
                pooled = p = None
                if len(seeds) >= FEWEST:
                    pooled, p = within_arms([np.array([g[seed] for seed in seeds]) for g in groups.values()])
                found.append(Predicted(name, str(measure), by_arm, pooled, p, len(seeds)))
    return found


def within_arms(groups: Sequence[np.ndarray], draws: int = DRAWS) -> tuple[float, float]:
    """Of arms on the same n seeds, each (n, 2) of early figure and outcome, in one order of seeds: correlation of ranks
    centred within each arm, over all arms, and its two-sided permutation p.

    A shuffle gives all outcomes of one seed to another, the same for every arm, since arms of one seed share problems,
    order and sampling and are no independent runs. All orders where they are few, else `draws` and the one at hand.
    """
    ranks = np.stack([stats.rankdata(group, axis=0) - (len(group) + 1) / 2 for group in groups])
    x, y = ranks[..., 0], ranks[..., 1]
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    if not scale:
        return 0.0, 1.0
    n = x.shape[1]
    if math.factorial(n) <= draws:
        orders = np.array(list(itertools.permutations(range(n))))
    else:
        generator = np.random.default_rng(BOOTSTRAP_SEED)
        shuffled = generator.permuted(np.broadcast_to(np.arange(n), (draws, n)), axis=1)
        orders = np.concatenate([np.arange(n)[None], shuffled])
    every = np.einsum("an,aon->o", x, y[:, orders]) / scale
    return float(every[0]), float((np.abs(every) >= abs(every[0]) - 1e-12).mean())


def prediction_table(predicted: Sequence[Predicted]) -> Table | None:
    """A row a predictor and outcome; None where there is none."""
    if not predicted:
        return None
    rows = []
    for one in predicted:
        arms = "; ".join(f"{arm} {rho:+.2f}" for arm, (rho, _) in one.by_arm.items())
        pooled = NONE if one.pooled is None else f"{one.pooled:+.2f}"
        rows.append([one.predictor, one.outcome, arms, pooled, p_value(one.p), str(one.n_seeds)])
    head = ["in the first steps", "outcome", "Spearman's ρ by arm", "within arms", "p", "seeds"]
    notes = [
        f"Each figure over the first {EARLY} steps against the run's outcome. Within arms: correlation of ranks "
        f"centred in each arm, on the seeds that all of them have, with the p of shuffling seeds; not adjusted for "
        f"there being {len(rows)} rows. Arms with fewer than {FEWEST} runs, or whose runs all end alike, are left out.",
    ]
    return Table("early", "What the first steps tell of the end", head, rows, notes, left=3)
