"""The plots of what goes on inside: gradients, where δ goes, how bases age, single rollouts as a detector."""

from collections.abc import Mapping
from typing import Any

import matplotlib.lines
import numpy as np
from matplotlib.ticker import MaxNLocator

from projected_grpo.report.compare import Study
from projected_grpo.report.drawing import (
    SMOOTH_FROM,
    Plot,
    banded_arms,
    figure_of,
    finish,
    label_steps,
    look_of,
    series,
)
from projected_grpo.report.mechanism import Displacement
from projected_grpo.report.settings import runs_of


def gradients(study: Study) -> Plot:
    title = "How hack-ward the gradient is"
    keys: dict[str, Any] = {
        "cin_s": ("student", "#0072B2", "-"),
        "cin_t": ("teacher", "#D55E00", "--"),
        "cin_null": ("null", "#555", ":"),
    }
    arms = [arm for arm in study.arms.values() if any(len(series(arm, key)[0]) for key in ("cin_s", "cin_t"))]
    if not arms:
        return Plot("gradients", title, "", why_not="no run that is compared has logged cin_s or cin_t")
    keys = {key: how for key, how in keys.items() if any(len(series(arm, key)[0]) for arm in arms)}
    columns = min(len(arms), 3)
    rows = -(-len(arms) // columns)
    figure, grid = figure_of(rows, columns, 0.5 + 2.3 * rows, sharey=True, sharex=True)
    for axes, arm in zip(grid.flat, arms, strict=False):
        for key, (_, colour, line) in keys.items():
            steps, mean, low, high = series(arm, key, smooth=False)
            if len(steps):
                axes.plot(steps, mean, color=colour, linestyle=line, lw=1.4)
                axes.fill_between(steps, low, high, color=colour, alpha=0.14, lw=0)
        axes.set_title(f"{arm.name} (n={len(arm.runs)})")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    top = max(float(np.nanmax(series(arm, key)[1])) for arm in arms for key in keys if len(series(arm, key)[0]))
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
    return finish(figure, "gradients", title, caption)


def drift(study: Study) -> Plot:
    title = "Where δ goes along the basis"
    arms = [arm for arm in study.arms.values() if len(series(arm, "v_delta")[0])]
    if not arms:
        return Plot("drift", title, "", why_not="no run that is compared has logged v_delta")
    longest = max(run.steps for arm in arms for run in runs_of(arm))
    smooth = longest >= SMOOTH_FROM
    banded, said = banded_arms(arms)
    figure, grid = figure_of(1, 2, 3.6)
    keys = {"v_delta": "mean V δ (below 0: hack-ward)", "cup_out": "cup, the step's hack-ward share"}
    for axes, (key, name) in zip(grid[0], keys.items(), strict=True):
        for arm in arms:
            steps, mean, low, high = series(arm, key, smooth)
            look = look_of(study, arm)
            axes.plot(steps, mean, lw=1.6, color=look["color"], linestyle=look["linestyle"], label=arm.name)
            if arm.kind in banded:
                axes.fill_between(steps, low, high, color=look["color"], alpha=0.12, lw=0)
        axes.set_title(name)
        label_steps(axes, smooth)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    caption = (
        "The optimiser steps along -g, so V δ sinks as hacking leaks through and rises with the one-sided gate's "
        "drift; cup is taken after the update's projection, where there is one. Mean over seeds with its 95 % t "
        f"interval{said}."
    )
    return finish(figure, "drift", title, caption)


def dose(study: Study, moved: Mapping[str, Displacement]) -> Plot:
    title = "Where δ ends along the real basis, and what the policy does"
    if not moved:
        return Plot("dose", title, "", why_not="no run that is compared has an adapter over a real basis's factors")
    figure, grid = figure_of(1, 2, 4.0, sharex=True)
    for axes, rate in zip(grid[0], ("hack", "pass"), strict=True):
        measure = study.main(rate)
        for arm in study.arms.values():
            values = arm.values(measure)
            at = {seed: moved.get(str(observed.run.folder)) for seed, observed in arm.runs.items()}
            seeds = [seed for seed in values if at[seed] is not None]
            look = look_of(study, arm) | {"linestyle": "none"}
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
    return finish(figure, "dose", title, caption)


def staleness(study: Study) -> Plot:
    title = "How a basis that is made anew stands to those before it"
    arms = [arm for arm in study.arms.values() if len(series(arm, "refresh/overlap")[0])]
    if not arms:
        return Plot("staleness", title, "", why_not="no run refreshes its basis (--vhack-refresh-every)")
    keys = {"refresh/overlap": "overlap with the one before", "refresh/overlap_first": "overlap with the first"}
    keys = {key: name for key, name in keys.items() if any(len(series(arm, key)[0]) for arm in arms)}
    figure, grid = figure_of(1, len(keys), 3.6, sharey=True)
    for axes, (key, name) in zip(grid[0], keys.items(), strict=True):
        for arm in arms:
            look = look_of(study, arm) | {"marker": ""}
            steps, mean, low, high = series(arm, key)
            axes.plot(steps, mean, lw=1.6, **look, label=f"{arm.name} (n={len(arm.runs)})")
            axes.fill_between(steps, low, high, color=look["color"], alpha=0.12, lw=0)
            steps, null, *_ = series(arm, "refresh/overlap_null")
            if key == "refresh/overlap":
                axes.plot(steps, null, lw=1, color="#555", linestyle=":")
        axes.set_ylim(0, 1.02)
        axes.set_title(name)
        label_steps(axes, smooth=False)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    caption = (
        "‖V_new V_oldᵀ‖² / min(k_new, k_old), mean over the modules that both have (those that one of them lacks do "
        "not count); dotted, its value for unrelated subspaces. Mean over seeds with its 95 % t interval."
    )
    return finish(figure, "staleness", title, caption)


def detector(study: Study) -> Plot:
    title = "Does a rollout's own gradient tell that it hacks?"
    keys = {"rollout/auroc": "cosine with the basis", "rollout/auroc_advantage": "sign of the advantage"}
    arms = [arm for arm in study.arms.values() if len(series(arm, "rollout/auroc")[0])]
    if not arms:
        return Plot("detector", title, "", why_not="no run measured its rollouts' gradients (--rollout-grad-every)")
    figure, grid = figure_of(1, 2, 3.6, sharey=True)
    banded, said = banded_arms(arms)
    for axes, (key, name) in zip(grid[0], keys.items(), strict=True):
        for arm in arms:
            steps, mean, low, high = series(arm, key, at_least=len(arm.runs) / 2)
            look = look_of(study, arm)
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
        f"have both classes at that step, where that is half of them or more, with its 95 % t interval{said}."
    )
    return finish(figure, "detector", title, caption)
