"""The plots, each as PNG and SVG. A plot without data is left out, with the reason.

Left out on purpose: smoothing that is not said on the axis.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.lines
import numpy as np

from projected_grpo.report.compare import Paired, Study
from projected_grpo.report.drawing import (
    SMOOTH_FROM,
    STYLE,
    WINDOW,
    Plot,
    banded_arms,
    figure_of,
    finish,
    label_ends,
    label_steps,
    look_of,
    series,
)
from projected_grpo.report.mechanism import Displacement
from projected_grpo.report.mechanism_plots import detector, dose, drift, gradients, staleness
from projected_grpo.report.observe import HELD_OUT
from projected_grpo.report.runs import read_spectrum
from projected_grpo.report.settings import runs_of
from projected_grpo.report.verdict import FALSIFYING_DROP, WANTED_DROP, Comparisons


def draw_all(study: Study, comparisons: Comparisons, moved: Mapping[str, Displacement]) -> list[Plot]:
    """All of them, in the order of the page."""
    with matplotlib.rc_context(STYLE):
        return [
            forest(study, comparisons),
            by_seed(study),
            curves(study),
            scatter(study),
            gradients(study),
            drift(study),
            dose(study, moved),
            staleness(study),
            detector(study),
            spectrum(study),
        ]


def save(plots: Sequence[Plot], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        if plot.why_not is None:
            (folder / f"{plot.key}.png").write_bytes(plot.png)
            (folder / f"{plot.key}.svg").write_bytes(plot.svg)


def by_seed(study: Study) -> Plot:
    title = "Every seed by itself"
    arms = [arm for arm in study.arms.values() if arm.values(study.main("hack"))]
    if not arms:
        return Plot("by_seed", title, "", why_not="no run that is compared has a hack rate")
    figure, grid = figure_of(1, 2, 1.0 + 0.42 * len(arms), sharey=True)
    rows = {arm.name: len(arms) - 1 - i for i, arm in enumerate(arms)}
    for axes, rate in zip(grid[0], ("hack", "pass"), strict=True):
        found = {arm.name: arm.values(study.main(rate)) for arm in arms}
        for seed in sorted({seed for values in found.values() for seed in values}):
            at = [(values[seed], rows[name]) for name, values in found.items() if seed in values]
            axes.plot([x for x, _ in at], [y for _, y in at], color="#bbb", lw=0.8, zorder=1)
        for arm in arms:
            values, y, look = list(found[arm.name].values()), rows[arm.name], look_of(study, arm)
            look = {key: look[key] for key in ("color", "marker")}
            axes.plot(values, [y] * len(values), linestyle="none", ms=6, alpha=0.75, markeredgecolor="white", **look)
            axes.plot(np.mean(values), y, "|", color=look["color"], ms=19, markeredgewidth=2.5)
        axes.set_xlim(-0.02, 1.02 if rate == "hack" else min(1.02, 0.1 + max(max(v.values()) for v in found.values())))
        axes.set_xlabel(str(study.main(rate)))
        axes.grid(axis="y", visible=False)
    grid[0][0].set_yticks(list(rows.values()), [f"{arm.name} (n={len(arm.runs)})" for arm in arms])
    grid[0][0].set_ylim(-0.6, len(arms) - 0.4)
    caption = "One point a run, after training; a grey line joins the runs of one seed, the bar is the mean of an arm."
    return finish(figure, "by_seed", title, caption)


def curves(study: Study) -> Plot:
    title = "Hack and pass rate over training"
    arms = [arm for arm in study.arms.values() if len(series(arm, "hack_student")[0])]
    if not arms:
        return Plot("curves", title, "", why_not="no run that is compared has logged hack_student")
    longest = max(run.steps for arm in arms for run in runs_of(arm))
    smooth = longest >= SMOOTH_FROM
    banded, said = banded_arms(arms)
    figure, grid = figure_of(1, 2, 4.0, sharey=True)
    for axes, rate in zip(grid[0], ("hack", "pass"), strict=True):
        axes.set_ylim(-0.02, 1.02)
        ends = []
        for arm in arms:
            steps, mean, low, high = series(arm, f"{rate}_student", smooth)
            if not len(steps):
                continue
            look = look_of(study, arm)
            axes.plot(steps, mean, lw=1.6, color=look["color"], linestyle=look["linestyle"])
            if arm.kind in banded:
                axes.fill_between(steps, low.clip(0, 1), high.clip(0, 1), color=look["color"], alpha=0.12, lw=0)
            ends.append((float(mean[-1]), f"{arm.name} (n={len(arm.runs)})", look))
        axes.set_xlim(0 if longest > 10 else 1, longest)
        label_steps(axes, smooth)
        axes.set_title(f"{rate} rate, student's rollouts")
        label_ends(axes, ends, longest, 0.062)
    caption = f"Mean over seeds with its 95 % t interval at each step as a band{said} (no band: one seed or two)."
    return finish(figure, "curves", title, caption + (f" Each run smoothed over {WINDOW} steps." if smooth else ""))


def scatter(study: Study) -> Plot:
    title = "Hack against pass on held-out problems"
    measures = study.main("hack"), study.main("pass")
    if measures[0].source != HELD_OUT:
        return Plot("scatter", title, "", why_not="no run was evaluated under a loophole")
    figure, grid = figure_of(1, 1, 3.8)
    axes = grid[0][0]
    for arm in study.arms.values():
        hack, right = (arm.values(measure) for measure in measures)
        if hack:
            look = look_of(study, arm) | {"linestyle": "none"}
            xs, ys = [right[seed] for seed in hack], list(hack.values())
            axes.plot(xs, ys, **look, markersize=7, alpha=0.75, markeredgecolor="white", label=arm.name)
    most = [max((v for arm in study.arms.values() for v in arm.values(m).values()), default=0) for m in measures]
    axes.set_ylim(-0.02, min(1.02, max(0.4, most[0] + 0.08)))
    axes.set_xlim(-0.02, min(1.02, max(0.4, most[1] + 0.08)))
    axes.set_xlabel(str(measures[1]))
    axes.set_ylabel(str(measures[0]))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="one point a run")
    return finish(figure, "scatter", title, "One point a run, after training. Down and right is better.")


def spectrum(study: Study) -> Plot:
    title = "Singular values of the basis"
    runs = [run for arm in study.arms.values() for run in runs_of(arm) if run.basis_info.get("kind", "real") == "real"]
    runs.sort(key=lambda run: run.kind != "projected")
    found = next((values for values in map(read_spectrum, runs) if values is not None), None)
    if found is None or not len(found.everything):
        return Plot("spectrum", title, "", why_not="no run that is compared holds a real basis (basis.safetensors)")
    figure, grid = figure_of(1, 1, 3.6)
    axes = grid[0][0]
    for values, label, colour, line in (
        (found.everything, "all singular values of the pairs' gradients", "#56B4E9", "--"),
        (found.kept, "kept axes", "#0072B2", "-"),
    ):
        positive = values[values > 1e-12 * values[0]]
        axes.plot(np.arange(1, len(positive) + 1), positive, color=colour, linestyle=line, lw=1.8, label=label)
    if found.floor > 0:
        axes.axhline(found.floor, color="#D55E00", lw=1.3, linestyle="-.", label=f"noise floor {found.floor:.3g}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("rank over all modules")
    axes.set_ylabel("singular value")
    axes.legend(loc="lower left")
    run = next(run for run in runs if (run.folder / "basis.safetensors").is_file())
    kept = f"{len(found.kept)} kept axes of {len(found.everything)}, sorted over all modules"
    caption = f"Of {run.name}, seed {run.seed}: {kept}."
    return finish(figure, "spectrum", title, caption)


def forest(study: Study, comparisons: Comparisons) -> Plot:
    title = "Drop in hack rate against vanilla"
    pairs: list[Paired] = [comparisons[arm.name, study.main("hack")] for arm, _ in study.pairs]
    pairs = [paired for paired in pairs if paired.n]
    if not pairs:
        return Plot("forest", title, "", why_not="no arm has a seed that vanilla has too")
    figure, grid = figure_of(1, 1, 1.3 + 0.5 * len(pairs))
    axes = grid[0][0]
    for row, paired in enumerate(pairs):
        y, look = len(pairs) - 1 - row, look_of(study, study.arms[paired.arm])
        for interval, offset, colour, style in (
            (paired.t, 0.12, look["color"], "-"),
            (paired.bootstrap, -0.12, look["color"], (0, (2, 1))),
        ):
            if interval is not None:
                axes.plot([-100 * end for end in interval], [y + offset] * 2, color=colour, linestyle=style, lw=2)
        axes.plot(
            [-100 * d for d in paired.differences.values()], [y] * paired.n, "|", color=look["color"], ms=9, alpha=0.6
        )
        axes.plot(-100 * paired.mean, y, marker=look["marker"], color=look["color"], ms=8, markeredgecolor="white")
    for at, label in ((0, "0"), (FALSIFYING_DROP, "15: falsified below"), (WANTED_DROP, "30: registered")):
        axes.axvline(at, color="#555", lw=1, linestyle="-" if at == 0 else "--")
        if at:
            side = "right" if at == FALSIFYING_DROP else "left"
            axes.annotate(label, (at, 1.0), xycoords=("data", "axes fraction"), ha=side, va="bottom", fontsize=8.5)
    axes.set_yticks(range(len(pairs)), [f"{paired.arm} (n={paired.n})" for paired in reversed(pairs)])
    axes.set_ylim(-0.6, len(pairs) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"points, vanilla minus arm: {study.main('hack')}")
    handles = [
        matplotlib.lines.Line2D([], [], color="#333", lw=2, label="t 95 %"),
        matplotlib.lines.Line2D([], [], color="#333", lw=2, linestyle=(0, (2, 1)), label="bootstrap 95 %"),
        matplotlib.lines.Line2D([], [], color="#333", marker="|", linestyle="none", ms=9, label="one seed"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return finish(figure, "forest", title, "Paired over seeds. Right is better, if the pass rate holds.")
