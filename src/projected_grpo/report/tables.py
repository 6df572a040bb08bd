"""The tables of results: rates of the arms, differences to vanilla, controls, power.

No mean is silent: beside each stands the number of its seeds, and an empty cell has its reason below the table.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from projected_grpo.report import stats
from projected_grpo.report.compare import Arm, Paired, Study, Summary, summarise
from projected_grpo.report.observe import ALL, HELD_OUT, LAST_STEPS, Measure
from projected_grpo.report.settings import runs_of
from projected_grpo.report.table import NONE, Table, p_value, percent, percents, points, points_range
from projected_grpo.report.verdict import FALSIFYING_DROP, WANTED_DROP, Comparisons, ControlVerdict, Verdict

CURVE_WIDTH = 40
LEVELS = "▁▂▃▄▅▆▇█"
ONE_SEED = "one seed: no interval"


def rate_cells(summary: Summary) -> list[str]:
    """mean, interval, n."""
    interval = ONE_SEED if len(summary.seeds) == 1 else percents(summary.interval)
    return [percent(summary.mean), interval, str(len(summary.seeds))]


def main_table(study: Study, comparisons: Comparisons, verdicts: Sequence[Verdict]) -> Table:
    """One row an arm: what a reader wants to see first."""
    outcome = {verdict.arm: verdict.outcome for verdict in verdicts}
    hack = study.main("hack")
    rows = []
    for arm in study.arms.values():
        cells = [arm.name]
        for measure in _glance(study):
            summary = summarise(arm, measure)
            cells.append(NONE if summary.mean is None else f"{percent(summary.mean)} (n={len(summary.seeds)})")
        paired = comparisons.get((arm.name, hack))
        if arm.kind == "vanilla":
            cells += [NONE, NONE, "reference" if arm in study.references.values() else NONE]
        elif paired is None or not paired.n:
            cells += [NONE, NONE, outcome.get(arm.name, NONE)]
        else:
            drop = [-end for end in reversed(paired.interval)] if paired.interval else None
            wide = ONE_SEED if drop is None else points_range((drop[0], drop[1]))
            cells += [f"{points(-paired.mean)} (n={paired.n})", wide, outcome[arm.name]]
        rows.append(cells)
    head = ["arm", *(f"{m.rate}, {_where(m)}" for m in _glance(study)), "drop in hack", "95 % interval", "verdict"]
    notes = [
        "Rates in per cent, mean over n seeds; the drop is in points, vanilla minus arm on the same seeds "
        f"({_where(hack)}), its interval the wider of bootstrap and t.",
        *empty_reasons(study, list(study.arms.values()), _glance(study)),
    ]
    return Table("main", "The arms at a glance", head, rows, notes)


def curves_table(study: Study) -> Table:
    """Hack and pass rates over the steps in characters: what one wants to see in a terminal."""
    rows = []
    for arm in study.arms.values():
        for rate in ("hack", "pass") if arm.runs else ():
            by_step: dict[int, list[float]] = {}
            for run in runs_of(arm):
                for row in run.metrics:
                    if row.get(f"{rate}_student") is not None:
                        by_step.setdefault(row["step"], []).append(row[f"{rate}_student"])
            means = [statistics.fmean(values) for _, values in sorted(by_step.items())]
            width = max(1, math.ceil(len(means) / CURVE_WIDTH))
            bins = [statistics.fmean(means[i : i + width]) for i in range(0, len(means), width)]
            line = "".join(LEVELS[min(int(share * len(LEVELS)), len(LEVELS) - 1)] for share in bins)
            rows.append([arm.name, rate, line, *map(percent, (bins[0], bins[-1]) if bins else (None, None))])
    head = ["arm", "rate", f"steps, {LEVELS[0]} 0 to {LEVELS[-1]} 100 %", "first", "last"]
    notes = ["Of the student's rollouts in training, per cent, mean over the seeds, a sign a bin of steps."]
    return Table("curves", "Over the steps", head, rows, notes, left=3)


def _glance(study: Study) -> list[Measure]:
    held = [study.main(rate) for rate in ("hack", "pass")] if study.source == HELD_OUT else []
    return held + [Measure(LAST_STEPS, ALL, rate) for rate in ("hack", "pass")]


def _where(measure: Measure) -> str:
    return measure.source if measure.mode == ALL else f"{measure.source} {measure.mode}"


def empty_reasons(study: Study, arms: Sequence[Arm], measures: Sequence[Measure]) -> list[str]:
    """Why an arm has no value, or fewer seeds than it has runs."""
    lines = []
    for arm in arms:
        if not arm.runs:
            lines.append(f"{arm.name}: no finished run that can be compared (see the list of runs).")
            continue
        for source in dict.fromkeys(measure.source for measure in measures):
            mine = [measure for measure in measures if measure.source == source]
            lacking = [seed for seed, run in arm.runs.items() if any(run.value(measure) is None for measure in mine)]
            if lacking:
                why = "no evaluation of it (no eval.json, or set aside)" if source == HELD_OUT else "not logged"
                lines.append(f"{arm.name}, {source}: nothing of seeds {', '.join(map(str, sorted(lacking)))}: {why}.")
    return lines


def rate_tables(study: Study) -> list[Table]:
    """Hack, attempt and pass by source and mode, with t intervals over seeds."""
    tables = []
    for (source, mode), measures in _groups(study).items():
        rates = [measure.rate for measure in measures]
        rows = []
        for arm in study.arms.values():
            cells = [arm.name]
            for measure in measures:
                cells += rate_cells(summarise(arm, measure))
            rows.append(cells)
        head = ["arm", *(title for rate in rates for title in (f"{rate} %", "95 % interval", "n"))]
        notes = ["Mean over n seeds and its t interval over seeds."]
        if mode == "none":
            notes.append("Without a loophole there is nothing to hack: the pass rate alone.")
        notes += empty_reasons(study, list(study.arms.values()), measures)
        tables.append(Table(f"rates-{_slug(source, mode)}", f"Rates: {_title(source, mode)}", head, rows, notes))
    return tables


def difference_tables(study: Study, comparisons: Comparisons) -> list[Table]:
    """Arm minus vanilla on the same seeds, with every interval and p."""
    if not study.pairs:
        note = "There is no vanilla run of any arm's settings (or more than one label), so no difference is computed."
        return [Table("differences", "Differences to vanilla", ["arm"], [], [note])]
    others = [f"{arm.name} is compared with {v.name}." for arm, v in study.pairs if v is not study.vanilla]
    others += [f"{a.name}: no vanilla of its settings." for a in study.others if a.name not in study.references]
    tables = _tables_of(study, comparisons, "differences", "vanilla")
    return [replace(table, notes=[*table.notes, *others]) for table in tables]


def against_tables(study: Study, comparisons: Comparisons, against: str) -> list[Table]:
    """Every other arm minus the arm `against` on the same seeds, as `difference_tables` does it for vanilla."""
    return _tables_of(study, comparisons, "against", against)


def _tables_of(study: Study, comparisons: Comparisons, key: str, reference: str) -> list[Table]:
    """A table for each source and mode."""
    tables = []
    for (source, mode), measures in _groups(study).items():
        pairs = [paired for (_, measure), paired in comparisons.items() if measure in measures]
        family = f"the comparisons with {reference} of the same rate, in this table"
        title = f"Differences to {reference}: {_title(source, mode)}"
        tables.append(paired_table(f"{key}-{_slug(source, mode)}", title, pairs, family))
    return tables


def paired_table(key: str, title: str, pairs: Sequence[Paired], family: str) -> Table:
    rows, reasons = [], []
    for paired in pairs:
        cells = [paired.arm, paired.measure.rate, points(paired.mean), str(paired.n)]
        if paired.n == 1:
            cells += [ONE_SEED, ONE_SEED]
        else:
            cells += [points_range(paired.bootstrap), points_range(paired.t)]
        cells += [points_range(paired.simultaneous)]
        cells += [p_value(p) for p in (paired.sign_p, paired.sign_holm, paired.t_p, paired.t_holm)]
        rows.append(cells)
        if paired.missing:
            reasons.append(f"{paired.arm}, {paired.measure.rate}: left out: {', '.join(paired.missing)}.")
        if paired.note and paired.n != 1:
            reasons.append(f"{paired.arm}, {paired.measure.rate}: {paired.note}.")
    sizes = sorted({paired.family for paired in pairs})
    notes = [
        "In points, arm minus reference, mean over the n seeds that both have. Bootstrap: over seeds and problems; "
        "over a handful of seeds it is too narrow, so the t interval over the seeds' differences stands beside it.",
        f"Family of Holm's p and of Bonferroni's simultaneous interval (at 0.05 / m, the wider of t and bootstrap): "
        f"{family}; m = {', '.join(map(str, sizes))}.",
        *_sign_test_limit(pairs),
        *dict.fromkeys(reasons),
    ]
    head = [
        "arm",
        "rate",
        "difference",
        "n",
        "bootstrap 95 %",
        "t 95 %",
        "simultaneous",
        "p sign",
        "its Holm",
        "p t",
        "its Holm",
    ]
    return Table(key, title, head, rows, notes, left=2)


def _sign_test_limit(pairs: Sequence[Paired]) -> list[str]:
    largest = max((paired.n for paired in pairs), default=0)
    if largest < 2 or 2 ** (1 - largest) <= stats.ALPHA:
        return []
    return [
        f"With {largest} seeds the sign test's p cannot be below {2 ** (1 - largest):.3g}, whatever the differences."
    ]


def control_table(study: Study, verdicts: Sequence[ControlVerdict]) -> Table:
    rows = []
    for verdict in verdicts:
        paired = verdict.paired
        overrun = {True: "overrun", False: "not overrun", None: "cannot be said"}[verdict.overrun]
        interval = ONE_SEED if paired.n == 1 else points_range(paired.interval)
        cells = [verdict.control, verdict.real, points(paired.mean), interval, str(paired.n)]
        rows.append([*cells, p_value(paired.t_p), p_value(paired.t_holm), overrun])
    notes = [
        f"Control minus real basis in hack rate ({_where(study.main('hack'))}), points, on the same seeds; above 0 "
        "the real basis holds more. The interval is the wider of bootstrap and t; Holm over the controls of one real "
        "basis.",
        "Overrun: the control hacks within 10 points of vanilla.",
        *(f"{v.control}, {v.real}: left out: {', '.join(v.paired.missing)}." for v in verdicts if v.paired.missing),
    ]
    if not verdicts:
        notes = ["There is no control, or no run of a real basis, so nothing is compared."]
    head = ["control", "real basis", "difference", "95 % interval", "n", "p t", "its Holm", "against vanilla"]
    return Table("controls", "Controls against the real basis", head, rows, notes, left=2)


def power_table(study: Study, comparisons: Comparisons) -> tuple[Table, list[dict]]:
    """How many seeds would show a drop of 30 and of 15 points, given the seeds' spread."""
    rows, numbers = [], []
    for arm in study.others:
        paired = comparisons.get((arm.name, study.main("hack")))
        if paired is None or paired.sd is None:
            rows.append([arm.name, NONE, "needs two paired seeds", str(paired.n if paired else 0), *[NONE] * 4])
            continue
        alphas = (stats.ALPHA, stats.ALPHA / paired.family)
        drops = (WANTED_DROP / 100, FALSIFYING_DROP / 100)
        needed = [stats.seeds_needed(drop, paired.sd, alpha) for drop in drops for alpha in alphas]
        shown = [f"> {stats.MAX_SEEDS}" if n is None else str(n) for n in needed]
        spread = percents(stats.sd_interval(paired.sd, paired.n))
        rows.append([arm.name, percent(paired.sd), spread, str(paired.n), *shown])
        numbers.append({"arm": arm.name, "sd": paired.sd, "n": paired.n, "family": paired.family, "needed": needed})
    notes = [
        f"Seeds for {stats.POWER:.0%} power of the two-sided paired t test of the drop in hack rate "
        f"({_where(study.main('hack'))}), at 0.05 and at 0.05 / m; m is the number of arms compared with vanilla. "
        "The SD of a few seeds is itself uncertain (its 95 % interval, for normal values, stands beside it).",
    ]
    head = [
        "arm",
        "SD of differences",
        "its 95 % interval",
        "n",
        "30 points",
        "at 0.05 / m",
        "15 points",
        "at 0.05 / m",
    ]
    return Table("power", "Seeds needed", head, rows, notes), numbers


def _groups(study: Study) -> Mapping[tuple[str, str], list[Measure]]:
    groups: dict[tuple[str, str], list[Measure]] = {}
    for measure in study.measures():
        groups.setdefault((measure.source, measure.mode), []).append(measure)
    return groups


def _slug(source: str, mode: str) -> str:
    return f"{source}-{mode}".replace(" ", "-")


def _title(source: str, mode: str) -> str:
    if source == LAST_STEPS:
        return f"{LAST_STEPS} of training, student rollouts"
    if mode == ALL:
        return "held-out problems after training, all loopholes together"
    return f"held-out problems after training, {'no loophole' if mode == 'none' else f'mode {mode}'}"


def rates_of(study: Study) -> list[dict]:
    """Every rate of every run and arm, for report.json."""
    found = []
    for arm in study.arms.values():
        for measure in study.measures():
            summary = summarise(arm, measure)
            found.append(
                {
                    "arm": arm.name,
                    **measure._asdict(),
                    "by_seed": arm.values(measure),
                    "mean": summary.mean,
                    "t_interval": summary.interval,
                    "n": len(summary.seeds),
                }
            )
    return found
