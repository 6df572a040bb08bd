"""Arms side by side: means over seeds, and differences between two arms on the seeds that both have.

A difference is always arm minus reference, so a drop in hack rate is below 0. Nothing is compared across seeds: a seed
that one of the two lacks is named and left out. Left out on purpose: a pooled test over arms, as nobody registered one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from projected_grpo.report import stats
from projected_grpo.report.observe import ALL, HELD_OUT, HITS, LAST_STEPS, Measure, Observed
from projected_grpo.report.runs import Run
from projected_grpo.report.settings import OF_THE_METHOD, departures
from projected_grpo.report.stats import ALPHA, Interval

RATES = tuple(HITS)
BOOTSTRAP_SEED = 41


@dataclass(frozen=True)
class Arm:
    name: str
    kind: str
    runs: dict[int, Observed]
    """Of the runs that are compared, by seed; empty where none is."""

    def values(self, measure: Measure) -> dict[int, float]:
        found = {seed: run.value(measure) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Summary:
    """A mean over seeds. `interval`: t, None with fewer than two seeds."""

    arm: str
    measure: Measure
    seeds: tuple[int, ...]
    mean: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Paired:
    """An arm minus a reference, seed by seed, as shares (not points)."""

    arm: str
    reference: str
    measure: Measure
    differences: dict[int, float]
    missing: tuple[str, ...] = ()
    """Seeds that were left out, each with the reason."""
    t: Interval | None = None
    bootstrap: Interval | None = None
    sign_p: float | None = None
    t_p: float | None = None
    sign_holm: float | None = None
    t_holm: float | None = None
    family: int = 1
    """How many comparisons of this measure there are: what Holm and Bonferroni adjust for."""
    simultaneous: Interval | None = None
    """At α / family: the wider of t and bootstrap at both ends."""
    note: str | None = field(default=None)

    @property
    def n(self) -> int:
        return len(self.differences)

    @property
    def mean(self) -> float | None:
        return float(np.mean(list(self.differences.values()))) if self.differences else None

    @property
    def sd(self) -> float | None:
        return float(np.std(list(self.differences.values()), ddof=1)) if self.n > 1 else None

    @property
    def standard_error(self) -> float | None:
        return stats.standard_error(list(self.differences.values()))

    @property
    def interval(self) -> Interval | None:
        """The wider of t and bootstrap at both ends: what the verdict goes by."""
        return envelope(self.t, self.bootstrap)


def envelope(first: Interval | None, second: Interval | None) -> Interval | None:
    """The smallest interval that holds both; None where the t interval (the first) is missing."""
    if first is None or second is None:
        return first
    return min(first[0], second[0]), max(first[1], second[1])


@dataclass(frozen=True)
class Study:
    """All runs of the report, and the arms made of those that are compared."""

    runs: list[Run]
    arms: dict[str, Arm]
    modes: tuple[str, ...]
    """Of the held-out evaluations, loopholes first; empty where nothing was evaluated."""
    vanilla: Arm | None
    """The arm called vanilla, or the only one of that kind; None where there is no such run."""
    references: dict[str, Arm]
    """By arm: the vanilla that has its settings but for those of the method; an arm without one is not in it."""

    @property
    def loopholes(self) -> tuple[str, ...]:
        return tuple(mode for mode in self.modes if mode != "none")

    @property
    def source(self) -> str:
        """What the verdict goes by: held-out problems wherever any run was evaluated on a loophole."""
        return HELD_OUT if self.loopholes else LAST_STEPS

    @property
    def others(self) -> list[Arm]:
        return [arm for arm in self.arms.values() if arm.kind != "vanilla"]

    @property
    def pairs(self) -> list[tuple[Arm, Arm]]:
        """Every arm with the vanilla that it is compared with."""
        return [(arm, self.references[arm.name]) for arm in self.others if arm.name in self.references]

    def measures(self) -> list[Measure]:
        """All but styles: each source and mode, with hack, attempt and pass; of mode `none` the pass rate alone."""
        wanted = [Measure(HELD_OUT, ALL, rate) for rate in RATES] if len(self.loopholes) > 1 else []
        for mode in self.modes:
            wanted += [Measure(HELD_OUT, mode, rate) for rate in RATES if mode != "none" or rate == "pass"]
        return wanted + [Measure(LAST_STEPS, ALL, rate) for rate in RATES]

    def main(self, rate: str) -> Measure:
        """The measure that the verdict goes by."""
        one = self.source == HELD_OUT and len(self.loopholes) == 1
        return Measure(self.source, self.loopholes[0] if one else ALL, rate)


def make_study(runs: list[Run], observed: Mapping[str, Observed]) -> Study:
    """`observed`: by the folder's path, of the runs that are compared."""
    arms: dict[str, Arm] = {}
    for run in runs:
        arm = arms.setdefault(run.name, Arm(run.name, run.kind, {}))
        if str(run.folder) in observed:
            arm.runs[run.seed] = observed[str(run.folder)]
    modes = {
        completion.mode
        for arm in arms.values()
        for run in arm.runs.values()
        for completion in run.completions.get(HELD_OUT, [])
    }
    ordered = (*sorted(modes - {"none"}), *sorted(modes & {"none"}))
    plain = [arm for arm in arms.values() if arm.kind == "vanilla"]
    found = {arm.name: _one_vanilla([p for p in plain if _like(arm, p)]) for arm in arms.values()}
    references = {name: arm for name, arm in found.items() if arm is not None}
    return Study(runs, arms, ordered, _one_vanilla(plain), references)


def _one_vanilla(arms: Sequence[Arm]) -> Arm | None:
    """The one called so, or the only one: two labels of one thing are nobody's reference."""
    if len(arms) == 1:
        return arms[0]
    return next((arm for arm in arms if arm.name == "vanilla"), None)


def _like(arm: Arm, vanilla: Arm) -> bool:
    """Whether the two could be told apart by the arm and the settings of the method alone."""
    return departures(arm, vanilla).keys() <= OF_THE_METHOD


def summarise(arm: Arm, measure: Measure) -> Summary:
    values = arm.values(measure)
    mean = float(np.mean(list(values.values()))) if values else None
    return Summary(arm.name, measure, tuple(values), mean, stats.t_interval(list(values.values())))


def pair(arm: Arm, reference: Arm, measure: Measure) -> Paired:
    """The differences on the seeds that both have; without intervals or tests."""
    first, second = arm.values(measure), reference.values(measure)
    differences = {seed: first[seed] - second[seed] for seed in first if seed in second}
    missing = []
    for seed in sorted({*arm.runs, *reference.runs} - differences.keys()):
        lacking = [one.name for one, values in ((arm, first), (reference, second)) if seed not in values]
        missing.append(f"seed {seed} (not in {' and '.join(lacking)})")
    note = None if differences else f"no seed that {arm.name} and {reference.name} both have: no difference"
    return Paired(arm.name, reference.name, measure, differences, tuple(missing), note=note)


def compare_all(compared: Sequence[tuple[Arm, Arm]], measures: Sequence[Measure]) -> dict[tuple[str, Measure], Paired]:
    """Every (arm, reference) by every measure, with intervals, tests and the adjustments for their number."""
    pairs = {(arm.name, measure): pair(arm, other, measure) for arm, other in compared for measure in measures}
    family = {measure: sum(pairs[arm.name, measure].n > 1 for arm, _ in compared) for measure in measures}
    for arm, reference in compared:
        replicates, notes = _replicates(arm, reference, [m for m in measures if pairs[arm.name, m].n > 1])
        for measure in measures:
            key = (arm.name, measure)
            paired = replace(pairs[key], note=notes.get(measure, pairs[key].note))
            pairs[key] = _with_intervals(paired, replicates.get(measure), max(family[measure], 1))
    for measure in measures:
        keys = [(arm.name, measure) for arm, _ in compared]
        signs = stats.holm([pairs[key].sign_p for key in keys])
        means = stats.holm([pairs[key].t_p for key in keys])
        for key, sign, mean in zip(keys, signs, means, strict=True):
            pairs[key] = replace(pairs[key], sign_holm=sign, t_holm=mean)
    return pairs


def _with_intervals(paired: Paired, replicates: np.ndarray | None, family: int) -> Paired:
    if paired.n == 1:
        paired = replace(paired, note="one seed: no interval")
    if paired.n < 2:
        return replace(paired, family=family)
    values = list(paired.differences.values())
    wide = stats.t_interval(values, ALPHA / family)
    bootstrap = simultaneous = None
    if replicates is not None:
        bootstrap = stats.percentile_interval(replicates)
        simultaneous = stats.percentile_interval(replicates, ALPHA / family)
    return replace(
        paired,
        t=stats.t_interval(values),
        bootstrap=bootstrap,
        sign_p=stats.sign_test(values),
        t_p=stats.t_test(values),
        family=family,
        simultaneous=envelope(wide, simultaneous),
        note=paired.note if bootstrap is not None else "no completions of it that both have: no bootstrap",
    )


def _replicates(
    arm: Arm, reference: Arm, measures: Sequence[Measure]
) -> tuple[dict[Measure, np.ndarray], dict[Measure, str]]:
    """Bootstrap replicates by measure, and a note where the two runs of a seed did not meet the same problems.

    Measures over the same seeds share their draws."""
    groups: dict[tuple, list[Measure]] = {}
    for measure in measures:
        seeds = tuple(pair(arm, reference, measure).differences)
        if all(one.runs[seed].counts(measure) is not None for one in (arm, reference) for seed in seeds):
            groups.setdefault((measure.source, seeds), []).append(measure)
    found: dict[Measure, np.ndarray] = {}
    notes: dict[Measure, str] = {}
    for (_, seeds), group in groups.items():
        counts = [_pair_counts(arm.runs[seed], reference.runs[seed], group) for seed in seeds]
        if all(len(count.problems) for count in counts):
            drawn = stats.paired_bootstrap(counts, np.random.default_rng(BOOTSTRAP_SEED))
            found |= {measure: drawn[:, i] for i, measure in enumerate(group)}
            common, met = sum(len(count.problems) for count in counts), sum(count.n_met for count in counts)
            if common < met:
                notes |= dict.fromkeys(group, f"bootstrap over the {common} of {met} problems that both runs met")
    return found, notes


def _pair_counts(first: Observed, second: Observed, measures: Sequence[Measure]) -> stats.PairCounts:
    """Over the problems that both runs met."""
    tables = [[run.counts(measure) for measure in measures] for run in (first, second)]
    met = [{problem for table in side for problem in table} for side in tables]
    problems = tuple(sorted(met[0] & met[1]))
    arrays = []
    for side in tables:
        cells = np.array([[table.get(problem, (0, 0)) for table in side] for problem in problems], dtype=float)
        cells = cells.reshape(len(problems), len(measures), 2)
        arrays += [cells[:, :, 0], cells[:, :, 1]]
    return stats.PairCounts(problems, len(met[0] | met[1]), *arrays)
