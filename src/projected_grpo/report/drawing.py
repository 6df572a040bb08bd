"""How every plot is drawn: PNG and SVG, in colours that colour-blind readers can tell apart (Okabe and Ito), and also
by line style and marker; series over seeds with their intervals.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from projected_grpo.report.compare import Arm, Study
from projected_grpo.report.runs import REAL
from projected_grpo.report.settings import runs_of
from projected_grpo.report.stats import t_interval

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


def finish(figure: Figure, key: str, title: str, caption: str) -> Plot:
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


def figure_of(rows: int, columns: int, height: float, **kwargs) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def look_of(study: Study, arm: Arm) -> dict:
    """Colour, line and marker of an arm, the same in every plot."""
    return look_at(list(study.arms).index(arm.name))


def look_at(i: int) -> dict:
    """Of the i-th arm."""
    shifted = (i + i // len(PALETTE)) % len(PALETTE)
    # From the ninth on other pairs of colour and marker, and none in black, which is the first one's alone.
    colour = PALETTE[i] if i < len(PALETTE) else PALETTE[1 + i % (len(PALETTE) - 1)]
    return {"color": colour, "linestyle": LINES[shifted], "marker": MARKERS[shifted]}


def series(
    arm: Arm, key: str, smooth: bool = False, at_least: float = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(steps, mean over seeds, low, high); the interval is nan with fewer than three seeds, where t knows next to
    nothing and a band covers the plot. Steps at which fewer than `at_least` seeds have a value are left out."""
    by_step: dict[int, list[float]] = {}
    for run in runs_of(arm):
        rows = [(row["step"], row[key]) for row in run.metrics if row.get(key) is not None]
        values = smoothed([value for _, value in rows]) if smooth else [value for _, value in rows]
        for (step, _), value in zip(rows, values, strict=True):
            by_step.setdefault(step, []).append(value)
    steps = sorted(step for step, values in by_step.items() if len(values) >= at_least)
    wanted = (by_step[step] if len(by_step[step]) >= 3 else [] for step in steps)
    intervals = [t_interval(values) or (np.nan, np.nan) for values in wanted]
    low, high = np.array(intervals).reshape(-1, 2).T
    return np.array(steps), np.array([np.mean(by_step[step]) for step in steps]), low, high


def smoothed(values: list[float]) -> list[float]:
    """Mean of the last WINDOW values at each step."""
    return [float(np.mean(values[max(0, i + 1 - WINDOW) : i + 1])) for i in range(len(values))]


def label_steps(axes: Axes, smooth: bool) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.set_xlabel("optimiser step" + (f" (smoothed over {WINDOW})" if smooth else ""))


def banded_arms(arms: Sequence[Arm]) -> tuple[set[str], str]:
    """The kinds of arms that get a band, and words about it: a dozen bands on each other show nothing."""
    if len(arms) <= MANY:
        return {arm.kind for arm in arms}, ""
    return {"vanilla", *REAL}, ", of vanilla and of arms on the real basis alone"


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, dict]], right: float, gap: float) -> None:
    """Names beside the lines' ends, moved apart where they would lie on each other. `ends`: (y, name, look)."""
    ordered = sorted(ends, key=lambda end: end[0])
    bottom = axes.get_ylim()[0] + gap / 2
    for i, at in enumerate(spread([y for y, _, _ in ordered], gap)):
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


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Sorted places at least `gap` apart, each block of neighbours centred on where it was."""
    blocks: list[tuple[float, int]] = []  # (centre, how many)
    for place in places:
        blocks.append((place, 1))
        while len(blocks) > 1 and blocks[-1][0] - blocks[-2][0] < gap * (blocks[-1][1] + blocks[-2][1]) / 2:
            (second, m), (first, n) = blocks.pop(), blocks.pop()
            blocks.append(((first * n + second * m) / (n + m), n + m))
    return [centre + gap * (i - (n - 1) / 2) for centre, n in blocks for i in range(n)]
