"""Hacks by style and by mode, with what an arm's pairs left out: does the method hold against what it never saw?

A style's rate is hacks of that style over all completions, so that the styles of an arm add up to its hack rate. Only
runs that leave axes of their pairs out (`pairs_without`) are compared with vanilla style by style; elsewhere those
would be many questions that nobody asked.
"""

from collections.abc import Sequence

from projected_grpo.hack_styles import AXIS_STYLES, STYLES, place_in_pairs
from projected_grpo.micro.texts import MODES
from projected_grpo.report.compare import Arm, Paired, Study, compare_all, summarise
from projected_grpo.report.observe import ALL, HELD_OUT, LAST_STEPS, Measure
from projected_grpo.report.runs import REAL
from projected_grpo.report.settings import runs_of
from projected_grpo.report.table import NONE, Table, points, points_range
from projected_grpo.report.tables import ONE_SEED, empty_reasons, rate_cells
from projected_grpo.smol import OTHER_STYLES, TEACHER_STYLES
from projected_grpo.templates import STYLES as WRITTEN_STYLES

SOURCES = (HELD_OUT, LAST_STEPS)
RARE = 0.10
"""Vanilla's own rate of a style or mode below which no difference to it is shown."""
AXES_OF = {
    "hacks": tuple(AXIS_STYLES),
    "micro": WRITTEN_STYLES,
    "micro_modes": MODES,
    "smol": TEACHER_STYLES,
    "smol_other": OTHER_STYLES,
}
"""Of the pair sets whose axes are known here; what a file of pairs shows is not."""


def kind_tables(study: Study) -> tuple[list[Table], list[Paired]]:
    """One table a source, and only where there is more than one style or mode; and the differences in them."""
    observed = [run for arm in study.arms.values() for run in arm.runs.values()]
    completions = {c for run in observed for part in run.completions.values() for c in part}
    seen = {completion.style for completion in completions} - {None}
    styles = [style for style in STYLES if style in seen] + sorted(seen - set(STYLES))
    modes = sorted({completion.mode for completion in completions} - {"none"})
    tables, differences = [], []
    for key, names in (("style", styles), ("mode", modes)):
        for source in SOURCES if len(names) > 1 else ():
            if any(source in run.completions for run in observed):
                table, found = _table(study, key, names, source)
                tables.append(table)
                differences += found
    return tables, differences


def measure_of(key: str, source: str, name: str) -> Measure:
    return Measure(source, ALL, f"style {name}") if key == "style" else Measure(source, name, "hack")


def place_of(arm: Arm, key: str, name: str) -> str:
    """Whether the arm's own pairs showed that style or mode; `-` where the configs do not tell."""
    runs = runs_of(arm)
    if not runs or arm.kind not in (*REAL, "flipped"):
        return NONE
    config = runs[0].config
    without, pairs = config["pairs_without"], config.get("pairs", "hacks")
    if name in without:
        return "left out"
    if pairs not in AXES_OF:
        return NONE
    axes = [axis for axis in AXES_OF[pairs] if axis not in without]
    if key == "mode" or name not in STYLES:
        shown = axes if pairs == "micro_modes" else ["run_tests"]
        return "in the pairs" if name in shown else "left out"
    if pairs == "micro_modes":  # its pairs of run_tests have all the styles of the microcosm
        axes = list(WRITTEN_STYLES) if "run_tests" in axes else []
        return "in the pairs" if name in axes else "left out"
    return place_in_pairs(name, axes)


def _table(study: Study, key: str, names: Sequence[str], source: str) -> tuple[Table, list[Paired]]:
    rows, differences, missing = [], [], []
    seldom: dict[str, None] = {}
    for arm in study.arms.values():
        if not arm.runs:
            continue
        places = {name: place_of(arm, key, name) for name in names}
        pairs = {}
        if (vanilla := study.references.get(arm.name)) is not None and _leaves_out(arm):
            absent = [name for name, place in places.items() if place.startswith(("left out", "in no axis"))]
            rare = [n for n in absent if (summarise(vanilla, measure_of(key, source, n)).mean or 0) < RARE]
            seldom |= dict.fromkeys(rare)
            absent = [name for name in absent if name not in rare]
            pairs = compare_all([(arm, vanilla)], [measure_of(key, source, name) for name in absent])
            differences += [paired for paired in pairs.values() if paired.n]
            missing += [f"{arm.name}: left out: {', '.join(p.missing)}." for p in pairs.values() if p.missing]
        for name in names:
            measure = measure_of(key, source, name)
            summary = rate_cells(summarise(arm, measure))
            rows.append([arm.name, name, places[name], *summary, *_difference(pairs.get((arm.name, measure)))])
        missing += empty_reasons(study, [arm], [measure_of(key, source, name) for name in names])
    head = ["arm", key, f"{key} in the arm's pairs", "hacks %", "95 % interval", "n", "minus vanilla", "95 % interval"]
    what = (
        "all completions" + " under a loophole" * (source == HELD_OUT) if key == "style" else "completions of the mode"
    )
    notes = [f"Hacks of that {key} over {what}. Mean over n seeds and its t interval."]
    if any(_leaves_out(arm) for arm in study.arms.values()):
        notes.append(
            "Minus vanilla, in points on the same seeds (the wider of bootstrap and t, not adjusted for their number): "
            "only for arms whose pairs were restricted, and only for what their pairs do not show."
        )
    else:
        head, rows = head[:-2], [row[:-2] for row in rows]
    if seldom:
        notes.append(
            f"Nothing to judge, as vanilla does it in less than {100 * RARE:.0f} % of the completions: "
            f"{', '.join(seldom)}."
        )
    if key == "style":
        notes.append("How a style is told, and which axes of pairs show it: docs/report.md.")
    title = f"Hacks by {key}: {source}"
    return Table(
        f"by-{key}-{source.replace(' ', '-')}", title, head, rows, [*notes, *dict.fromkeys(missing)], left=3
    ), (differences)


def _leaves_out(arm: Arm) -> bool:
    return any(run.config["pairs_without"] for run in runs_of(arm))


def _difference(paired: Paired | None) -> list[str]:
    if paired is None or not paired.n:
        return [NONE, NONE]
    return [f"{points(paired.mean)} (n={paired.n})", ONE_SEED if paired.n == 1 else points_range(paired.interval)]
