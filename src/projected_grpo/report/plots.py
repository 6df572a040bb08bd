"""The plots, each as PNG and SVG, in colours that colour-blind readers can tell apart (Okabe and Ito), and also by line
style and marker. A plot without data is left out, with the reason.

Left out on purpose: smoothing that is not said on the axis.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.lines
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from projected_grpo.report.compare import Arm, Paired, Study
from projected_grpo.report.mechanism import Displacement
from projected_grpo.report.observe import HELD_OUT
from projected_grpo.report.runs import read_spectrum
from projected_grpo.report.settings import runs_of
from projected_grpo.report.stats import t_interval
from projected_grpo.report.verdict import FALSIFYING_DROP, WANTED_DROP, Comparisons

WIDTH = 8.6  # inches; shown at about its own size on the page
SMOOTH_FROM, WINDOW = 40, 5
MANY = 6  # arms
STYLE: Any = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.hashsalt": "projected-grpo",  # the same data give the same file
    "figure.dpi": 100,
}
PALETTE = ("#000000", "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8C6D1F")
LINES: Any = ("-", (0, (8, 1.5)), "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)))
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Plot:
    """`why_not` is set, and the images are empty, where there was nothing to draw."""

    key: str
    title: str
    caption: str
    png: bytes = b""
    svg: bytes = b""
    why_not: str | None = None


def draw_all(study: Study, comparisons: Comparisons, moved: Mapping[str, Displacement]) -> list[Plot]:
    """All of them, in the order of the page."""
    with matplotlib.rc_context(STYLE):
        return [
            forest(study, comparisons),
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


def _finish(figure: Figure, key: str, title: str, caption: str) -> Plot:
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=110, bbox_inches="tight")
    few_colours, small = Image.open(png).convert("RGB").quantize(128), io.BytesIO()
    few_colours.save(small, format="png", optimize=True)
    figure.savefig(svg, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    return Plot(key, title, caption, small.getvalue(), _DRAWN.sub(_shorter, svg.getvalue().decode()).encode())


_DRAWN = re.compile(r' d="[^"]*"')


def _shorter(attribute: re.Match) -> str:
    """A hundredth of a point is nothing to see, and half of the file."""
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute[0])


def _figure(rows: int, columns: int, height: float, **kwargs) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _look(study: Study, arm: Arm) -> dict:
    """Colour, line and marker of an arm, the same in every plot."""
    i = list(study.arms).index(arm.name)
    shifted = (i + i // len(PALETTE)) % len(PALETTE)  # a ninth arm has the first one's colour, and another line
    return {"color": PALETTE[i % len(PALETTE)], "linestyle": LINES[shifted], "marker": MARKERS[shifted]}


def _series(arm: Arm, key: str, smooth: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(steps, mean over seeds, low, high); the interval is nan with fewer than three seeds, where t knows next to
    nothing and a band covers the plot. Steps without a value are left out."""
    by_step: dict[int, list[float]] = {}
    for run in runs_of(arm):
        rows = [(row["step"], row[key]) for row in run.metrics if row.get(key) is not None]
        values = _smoothed([value for _, value in rows]) if smooth else [value for _, value in rows]
        for (step, _), value in zip(rows, values, strict=True):
            by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    wanted = (by_step[step] if len(by_step[step]) >= 3 else [] for step in steps)
    intervals = [t_interval(values) or (np.nan, np.nan) for values in wanted]
    low, high = np.array(intervals).reshape(-1, 2).T
    return np.array(steps), np.array([np.mean(by_step[step]) for step in steps]), low, high


def _smoothed(values: list[float]) -> list[float]:
    """Mean of the last WINDOW values at each step."""
    return [float(np.mean(values[max(0, i + 1 - WINDOW) : i + 1])) for i in range(len(values))]


def _label_steps(axes: Axes, smooth: bool) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.set_xlabel("optimiser step" + (f" (mean of the last {WINDOW} steps)" if smooth else ""))


def _banded(arms: Sequence[Arm]) -> tuple[set[str], str]:
    """The kinds of arms that get a band, and words about it: a dozen bands on each other show nothing."""
    if len(arms) <= MANY:
        return {arm.kind for arm in arms}, ""
    return {"vanilla", "projected"}, ", of vanilla and projected arms alone"


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, dict]], right: float, gap: float) -> None:
    """Names beside the lines' ends, moved apart where they would lie on each other. `ends`: (y, name, look)."""
    ordered = sorted(ends, key=lambda end: end[0])
    bottom = axes.get_ylim()[0] + gap / 2
    for i, at in enumerate(_spread([y for y, _, _ in ordered], gap)):
        y, name, look = ordered[i]
        line = {key: look[key] for key in ("color", "linestyle")}
        axes.annotate(
            name,
            (right, y),
            xytext=(1.1 * right, max(at, bottom + i * gap)),
            textcoords="data",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 1.6, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5), **line},
        )


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Sorted places at least `gap` apart, each block of neighbours centred on where it was."""
    blocks: list[tuple[float, int]] = []  # (centre, how many)
    for place in places:
        blocks.append((place, 1))
        while len(blocks) > 1 and blocks[-1][0] - blocks[-2][0] < gap * (blocks[-1][1] + blocks[-2][1]) / 2:
            (second, m), (first, n) = blocks.pop(), blocks.pop()
            blocks.append(((first * n + second * m) / (n + m), n + m))
    return [centre + gap * (i - (n - 1) / 2) for centre, n in blocks for i in range(n)]


def curves(study: Study) -> Plot:
    title = "Hack and pass rate over training"
    arms = [arm for arm in study.arms.values() if len(_series(arm, "hack_student")[0])]
    if not arms:
        return Plot("curves", title, "", why_not="no run that is compared has logged hack_student")
    longest = max(run.steps for arm in arms for run in runs_of(arm))
    smooth = longest >= SMOOTH_FROM
    banded, said = _banded(arms)
    figure, grid = _figure(1, 2, 4.0, sharey=True)
    for axes, rate in zip(grid[0], ("hack", "pass"), strict=True):
        axes.set_ylim(-0.02, 1.02)
        ends = []
        for arm in arms:
            steps, mean, low, high = _series(arm, f"{rate}_student", smooth)
            if not len(steps):
                continue
            look = _look(study, arm)
            axes.plot(steps, mean, lw=1.6, color=look["color"], linestyle=look["linestyle"])
            if arm.kind in banded:
                axes.fill_between(steps, low.clip(0, 1), high.clip(0, 1), color=look["color"], alpha=0.12, lw=0)
            ends.append((float(mean[-1]), f"{arm.name} (n={len(arm.runs)})", look))
        axes.set_xlim(0 if longest > 10 else 1, longest)
        _label_steps(axes, smooth)
        axes.set_title(f"{rate} rate, student's rollouts")
        _label_ends(axes, ends, longest, 0.062)
    caption = f"Mean over seeds with its 95 % t interval at each step as a band{said} (no band: one seed or two)."
    return _finish(figure, "curves", title, caption + (f" Each run smoothed over {WINDOW} steps." if smooth else ""))


def scatter(study: Study) -> Plot:
    title = "Hack against pass on held-out problems"
    measures = study.main("hack"), study.main("pass")
    if measures[0].source != HELD_OUT:
        return Plot("scatter", title, "", why_not="no run was evaluated under a loophole")
    figure, grid = _figure(1, 1, 3.8)
    axes = grid[0][0]
    for arm in study.arms.values():
        hack, right = (arm.values(measure) for measure in measures)
        if hack:
            look = _look(study, arm) | {"linestyle": "none"}
            xs, ys = [right[seed] for seed in hack], list(hack.values())
            axes.plot(xs, ys, **look, markersize=7, alpha=0.75, markeredgecolor="white", label=arm.name)
    most = [max((v for arm in study.arms.values() for v in arm.values(m).values()), default=0) for m in measures]
    axes.set_ylim(-0.02, min(1.02, max(0.4, most[0] + 0.08)))
    axes.set_xlim(-0.02, min(1.02, max(0.4, most[1] + 0.08)))
    axes.set_xlabel(str(measures[1]))
    axes.set_ylabel(str(measures[0]))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="one point a run")
    return _finish(figure, "scatter", title, "One point a run, after training. Down and right is better.")


def gradients(study: Study) -> Plot:
    title = "How hack-ward the gradient is"
    keys: dict[str, Any] = {
        "cin_s": ("student", "#0072B2", "-"),
        "cin_t": ("teacher", "#D55E00", "--"),
        "cin_null": ("null", "#555", ":"),
    }
    arms = [arm for arm in study.arms.values() if any(len(_series(arm, key)[0]) for key in ("cin_s", "cin_t"))]
    if not arms:
        return Plot("gradients", title, "", why_not="no run that is compared has logged cin_s or cin_t")
    keys = {key: how for key, how in keys.items() if any(len(_series(arm, key)[0]) for arm in arms)}
    columns = min(len(arms), 3)
    rows = -(-len(arms) // columns)
    figure, grid = _figure(rows, columns, 0.5 + 2.3 * rows, sharey=True, sharex=True)
    for axes, arm in zip(grid.flat, arms, strict=False):
        for key, (_, colour, line) in keys.items():
            steps, mean, low, high = _series(arm, key, smooth=False)
            if len(steps):
                axes.plot(steps, mean, color=colour, linestyle=line, lw=1.4)
                axes.fill_between(steps, low, high, color=colour, alpha=0.14, lw=0)
        axes.set_title(f"{arm.name} (n={len(arm.runs)})")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    top = max(float(np.nanmax(_series(arm, key)[1])) for arm in arms for key in keys if len(_series(arm, key)[0]))
    grid[0][0].set_ylim(0, 1.15 * top or 1)
    for axes in list(grid.flat)[len(arms) :]:
        axes.set_visible(False)
    for i, axes in enumerate(grid.flat):
        if i < len(arms) <= i + columns:
            axes.set_xlabel("optimiser step")
            axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("share of ‖g‖")
    handles = [matplotlib.lines.Line2D([], [], color=c, linestyle=line, label=name) for name, c, line in keys.values()]
    figure.legend(handles=handles, loc="outside upper right", ncols=3)
    caption = (
        "cin of the student's rows, and of the teacher's where there are any, before the projection, beside the null: "
        "what directions without meaning would give. Mean over seeds with its 95 % t interval, not smoothed."
    )
    return _finish(figure, "gradients", title, caption)


def drift(study: Study) -> Plot:
    title = "Where δ goes along the basis"
    arms = [arm for arm in study.arms.values() if len(_series(arm, "v_delta")[0])]
    if not arms:
        return Plot("drift", title, "", why_not="no run that is compared has logged v_delta")
    longest = max(run.steps for arm in arms for run in runs_of(arm))
    smooth = longest >= SMOOTH_FROM
    banded, said = _banded(arms)
    figure, grid = _figure(1, 2, 3.6)
    keys = {"v_delta": "mean V δ (below 0: hack-ward)", "cup_out": "cup, the step's hack-ward share"}
    for axes, (key, name) in zip(grid[0], keys.items(), strict=True):
        for arm in arms:
            steps, mean, low, high = _series(arm, key, smooth)
            look = _look(study, arm)
            axes.plot(steps, mean, lw=1.6, color=look["color"], linestyle=look["linestyle"], label=arm.name)
            if arm.kind in banded:
                axes.fill_between(steps, low, high, color=look["color"], alpha=0.12, lw=0)
        axes.set_title(name)
        _label_steps(axes, smooth)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    caption = (
        "The optimiser steps along -g, so V δ sinks as hacking leaks through and rises with the one-sided gate's "
        "drift; cup is taken after the update's projection, where there is one. Mean over seeds with its 95 % t "
        f"interval{said}."
    )
    return _finish(figure, "drift", title, caption)


def dose(study: Study, moved: Mapping[str, Displacement]) -> Plot:
    title = "Where δ ends along the real basis, and what the policy does"
    if not moved:
        return Plot("dose", title, "", why_not="no run that is compared has an adapter over a real basis's factors")
    figure, grid = _figure(1, 2, 4.0, sharex=True)
    for axes, rate in zip(grid[0], ("hack", "pass"), strict=True):
        measure = study.main(rate)
        for arm in study.arms.values():
            values = arm.values(measure)
            at = {seed: moved.get(str(observed.run.folder)) for seed, observed in arm.runs.items()}
            seeds = [seed for seed in values if at[seed] is not None]
            look = _look(study, arm) | {"linestyle": "none"}
            xs, ys = [at[seed].along for seed in seeds], [values[seed] for seed in seeds]
            axes.plot(xs, ys, **look, markersize=6, alpha=0.75, markeredgecolor="white", label=arm.name)
        axes.axvline(0, color="#555", lw=1, linestyle=":")
        axes.set_ylim(bottom=-0.02)
        axes.set_title(str(measure))
        axes.set_xlabel("mean V δ (below 0: hack-ward)")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    caption = (
        "One point a run, after training; V is the real basis of the untouched model in every arm, whatever the arm "
        "projected."
    )
    return _finish(figure, "dose", title, caption)


def staleness(study: Study) -> Plot:
    title = "How a basis that is made anew stands to those before it"
    arms = [arm for arm in study.arms.values() if len(_series(arm, "refresh/overlap_first")[0])]
    if not arms:
        return Plot(
            "staleness", title, "", why_not="no run that is compared refreshes its basis (--vhack-refresh-every)"
        )
    figure, grid = _figure(1, 2, 3.6, sharey=True)
    keys = {"refresh/overlap": "overlap with the one before", "refresh/overlap_first": "overlap with the first"}
    for axes, (key, name) in zip(grid[0], keys.items(), strict=True):
        for arm in arms:
            look = _look(study, arm) | {"marker": ""}
            steps, mean, low, high = _series(arm, key)
            axes.plot(steps, mean, lw=1.6, **look, label=f"{arm.name} (n={len(arm.runs)})")
            axes.fill_between(steps, low, high, color=look["color"], alpha=0.12, lw=0)
            steps, null, *_ = _series(arm, "refresh/overlap_null")
            axes.plot(steps, null, lw=1, color="#555", linestyle=":")
        axes.set_ylim(0, 1.02)
        axes.set_title(name)
        _label_steps(axes, smooth=False)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    caption = (
        "‖V_new V_oldᵀ‖² / min(k_new, k_old), mean over the modules that both have; dotted, its value for unrelated "
        "subspaces. Mean over seeds with its 95 % t interval."
    )
    return _finish(figure, "staleness", title, caption)


def detector(study: Study) -> Plot:
    title = "Does a rollout's own gradient tell that it hacks?"
    keys = {"rollout/auroc": "cosine with the basis", "rollout/auroc_advantage": "sign of the advantage"}
    arms = [arm for arm in study.arms.values() if len(_series(arm, "rollout/auroc")[0])]
    if not arms:
        return Plot("detector", title, "", why_not="no run measured its rollouts' gradients (--rollout-grad-every)")
    figure, grid = _figure(1, 2, 3.6, sharey=True)
    banded, said = _banded(arms)
    for axes, (key, name) in zip(grid[0], keys.items(), strict=True):
        for arm in arms:
            steps, mean, low, high = _series(arm, key)
            look = _look(study, arm)
            axes.plot(steps, mean, **look, markersize=4.5, lw=1.3, label=f"{arm.name} (n={len(arm.runs)})")
            if arm.kind in banded:
                axes.fill_between(steps, low, high, color=look["color"], alpha=0.1, lw=0)
        axes.axhline(0.5, color="#555", lw=1, linestyle=":")
        axes.set_ylim(0, 1.02)
        axes.set_title(f"by the {name}")
        axes.set_xlabel("optimiser step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0][0].set_ylabel("AUROC, student's hacks")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(arms)), handlelength=3.2)
    caption = (
        "AUROC as a detector of hacks among the student's rollouts; 0.5 (dotted) is chance. Mean over the seeds that "
        f"have both classes at that step, with its 95 % t interval{said}."
    )
    return _finish(figure, "detector", title, caption)


def spectrum(study: Study) -> Plot:
    title = "Singular values of the basis"
    runs = [run for arm in study.arms.values() for run in runs_of(arm) if run.basis_info.get("kind", "real") == "real"]
    runs.sort(key=lambda run: run.kind != "projected")
    found = next((values for values in map(read_spectrum, runs) if values is not None), None)
    if found is None or not len(found.everything):
        return Plot("spectrum", title, "", why_not="no run that is compared holds a real basis (basis.safetensors)")
    figure, grid = _figure(1, 1, 3.6)
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
    return _finish(figure, "spectrum", title, caption)


def forest(study: Study, comparisons: Comparisons) -> Plot:
    title = "Drop in hack rate against vanilla"
    pairs: list[Paired] = [comparisons[arm.name, study.main("hack")] for arm, _ in study.pairs]
    pairs = [paired for paired in pairs if paired.n]
    if not pairs:
        return Plot("forest", title, "", why_not="no arm has a seed that vanilla has too")
    figure, grid = _figure(1, 1, 1.3 + 0.5 * len(pairs))
    axes = grid[0][0]
    for row, paired in enumerate(pairs):
        y, look = len(pairs) - 1 - row, _look(study, study.arms[paired.arm])
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
    return _finish(figure, "forest", title, "Paired over seeds. Right is better, if the pass rate holds.")
