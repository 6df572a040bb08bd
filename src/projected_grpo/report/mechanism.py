"""What moved along the real basis, whatever an arm projected, and what the first steps told of a run's end.

The measuring stick is one real basis of the untouched model: vanilla's, or else the first arm's that has one. Left out
on purpose: causes. A run may move along the basis and hack little for a third reason.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from scipy import stats

from projected_grpo.report.compare import BOOTSTRAP_SEED, Arm, Study
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
    stick = _measuring_stick(study)
    if stick is None:
        return {}
    found = {}
    for arm in study.arms.values():
        for run in runs_of(arm):
            if (one := _displacement(run, *stick)) is not None:
                found[str(run.folder)] = one
    return found


def _measuring_stick(study: Study) -> tuple[Weights, Weights] | None:
    """(directions, fingerprints) by module."""
    arms = sorted(study.arms.values(), key=lambda arm: arm is not study.vanilla)
    for run in (run for arm in arms for run in runs_of(arm)):
        if run.basis_info.get("kind") == "real" and not run.basis_info.get("delta_norm"):
            tensors = _tensors(run.folder / "basis.safetensors", "directions/", "fingerprints/")
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
    rows = []
    for arm in study.arms.values():
        those = [moved[str(run.folder)] for run in runs_of(arm) if str(run.folder) in moved]
        if not those:
            continue
        along = [one.along for one in those]
        spread = f"{min(along):+.2f} to {max(along):+.2f}" if len(along) > 1 else NONE
        share, norm = np.mean([one.in_span for one in those]), np.mean([one.norm for one in those])
        cells = [arm.name, str(len(those)), f"{np.mean(along):+.2f}", spread, percent(float(share)), f"{norm:.2f}"]
        rows.append(cells + [percent(_mean(arm, study, rate)) for rate in ("hack", "pass")])
    if not rows:
        return None
    hack = study.main("hack")
    head = ["arm", "n", "mean V δ", "over runs", "of ‖δ‖² in the span", "‖δ‖", "hack", "pass"]
    notes = [
        "δ at the end of a run along the real basis of the untouched model, whatever the arm projected; below 0 is "
        f"hack-ward. Hack and pass: per cent, {hack.source}.",
    ]
    return Table("displacement", "Where δ ends along the real basis", head, rows, notes)


def step_table(study: Study) -> Table | None:
    """What the optimiser makes of the projected gradient, over all steps; None where no run logged it."""
    rows = []
    for arm in study.arms.values():
        runs = runs_of(arm)
        if not any(row.get("v_delta") is not None for run in runs for row in run.metrics):
            continue
        shares = [_over_runs(runs, _over(key)) for key in ("cin", "cin_null", "cout", "cup_in", "cup_out")]
        own = _over_runs(runs, lambda metrics: metrics[-1].get("v_delta"))
        expected = [drift for run in runs if (drift := noise_drift(run)) is not None]
        noise = float(np.mean(expected)) if len(expected) == len(runs) else None
        cells = [NONE if share is None else f"{share:.3f}" for share in shares]
        cells += [NONE if value is None else f"{value:+.2f}" for value in (own, noise)]
        rows.append([arm.name, str(len(runs)), *cells])
    if not rows:
        return None
    head = ["arm", "n", "cin", "null", "cout", "cup", "cup_out", "own V δ", "from noise alone"]
    notes = [
        "Means over all steps and runs: the hack-ward share of the gradient before and after its projection, of the "
        "optimiser's step before and after its projection; V δ at the end along the arm's own, last basis. From noise "
        "alone: lr T / √(2π), for a projected update √((1 - β1) / (1 + β1)) of that, where a one-sided gate at "
        "overshoot 1 and a constant rate make it known (docs/method.md, 4).",
    ]
    return Table("steps", "What the optimiser makes of the gradient", head, rows, notes)


def noise_drift(run: Run) -> float | None:
    """V δ that the one-sided gate makes of gradients without any signal; None where there is no closed form."""
    config = run.config
    names = ("learning_rate", "adam_beta1", "gate", "project_target", "overshoot", "lr_scheduler", "warmup_steps")
    if run.kind in ("vanilla", "oracle", "random_matched") or not all(name in config for name in names):
        return None
    plain = (config["gate"], config["overshoot"], config["lr_scheduler"]) == ("one_sided", 1.0, "constant")
    if not plain or config["warmup_steps"] or config["project_target"] not in ("grad", "update"):
        return None
    drift = config["learning_rate"] * run.steps / (2 * np.pi) ** 0.5
    beta1 = config["adam_beta1"]
    return drift * ((1 - beta1) / (1 + beta1)) ** 0.5 if config["project_target"] == "update" else drift


def _over_runs(runs: Sequence[Run], of: Callable[[Sequence[Metrics]], float | None]) -> float | None:
    values = [value for run in runs if run.metrics and (value := of(run.metrics)) is not None]
    return float(np.mean(values)) if values else None


def _mean(arm: Arm, study: Study, rate: str) -> float | None:
    values = list(arm.values(study.main(rate)).values())
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
    """Two-sided, of shuffling outcomes within arms."""
    n: int


def predictions(study: Study) -> list[Predicted]:
    """Of every predictor and of the hack and the pass rate; empty where runs are too short or too few."""
    if any(run.steps < 2 * EARLY for arm in study.arms.values() for run in runs_of(arm)):
        return []
    found = []
    for rate in ("hack", "pass"):
        measure = study.main(rate)
        for name, early in PREDICTORS.items():
            groups: dict[str, tuple[np.ndarray, np.ndarray]] = {}
            for arm in study.arms.values():
                outcomes = arm.values(measure)
                firsts = {seed: early(one.run.metrics[:EARLY]) for seed, one in arm.runs.items() if seed in outcomes}
                seeds = [seed for seed, first in firsts.items() if first is not None]
                x, y = np.array([firsts[s] for s in seeds]), np.array([outcomes[s] for s in seeds])
                if len(seeds) >= FEWEST and np.ptp(x) > 0 and np.ptp(y) > 0:
                    groups[arm.name] = x, y
            if groups:
                by_arm = {arm: (float(stats.spearmanr(x, y).statistic), len(x)) for arm, (x, y) in groups.items()}
                pooled, p = within_arms(list(groups.values()))
                found.append(Predicted(name, str(measure), by_arm, pooled, p, sum(n for _, n in by_arm.values())))
    return found


def within_arms(groups: Sequence[tuple[np.ndarray, np.ndarray]], draws: int = DRAWS) -> tuple[float, float]:
    """Correlation of ranks centred within each group, over all groups, and its two-sided permutation p: the share of
    shuffles within groups, the one at hand counted in, that are at least as far from 0."""
    ranks = [tuple(stats.rankdata(z) - (len(z) + 1) / 2 for z in pair) for pair in groups]
    scale = np.sqrt(sum((x**2).sum() for x, _ in ranks) * sum((y**2).sum() for _, y in ranks))
    observed = sum(x @ y for x, y in ranks) / scale
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    shuffled = np.zeros(draws)
    for x, y in ranks:
        shuffled += generator.permuted(np.broadcast_to(y, (draws, len(y))), axis=1) @ x
    extreme = int((np.abs(shuffled / scale) >= abs(observed) - 1e-12).sum())
    return float(observed), (extreme + 1) / (draws + 1)


def prediction_table(predicted: Sequence[Predicted]) -> Table | None:
    """A row a predictor and outcome; None where there is none."""
    if not predicted:
        return None
    rows = []
    for one in predicted:
        arms = "; ".join(f"{arm} {rho:+.2f}" for arm, (rho, _) in one.by_arm.items())
        rows.append([one.predictor, one.outcome, arms, f"{one.pooled:+.2f}", p_value(one.p), str(one.n)])
    head = ["in the first steps", "outcome", "Spearman's ρ by arm", "within arms", "p", "runs"]
    notes = [
        f"Each figure over the first {EARLY} steps against the run's outcome. Within arms: correlation of ranks "
        f"centred in each arm, with the p of {DRAWS} shuffles within arms; not adjusted for there being {len(rows)} "
        f"rows. Arms with fewer than {FEWEST} runs, or whose runs all end alike, are left out.",
    ]
    return Table("early", "What the first steps tell of the end", head, rows, notes, left=3)
