"""What V δ alone does: finished policies sampled again with δ moved along a basis and left as it is everywhere else.

A run's V δ and its hack rate go together over arms, which says nothing of causes. Here V δ is set, axis by axis,
δ ← δ + (a - V δ) V, in a policy that training has left alone since. With another basis's directions (a random one) the
same says what moving as far in any direction does. `base` is the model without training, δ = 0.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from peft import PeftModel

from projected_grpo.adapter import delta_s_parameters
from projected_grpo.basis import HackBasis
from projected_grpo.config import EvalConfig, TrainConfig
from projected_grpo.env.grader import Grader
from projected_grpo.env.sandbox import Limits
from projected_grpo.errors import saving_faults
from projected_grpo.evaluate import measure
from projected_grpo.models import load_model
from projected_grpo.paths import check_out, replacing
from projected_grpo.projector import Projector
from projected_grpo.prompting import Prompter
from projected_grpo.run_state import evaluation_of
from projected_grpo.saved_adapter import adapted, check_adapter
from projected_grpo.sources import problems_of

BASE = "base"


def steer(runs: Sequence[Path], basis_file: Path, at: Sequence[float], samples: int, out: Path, overwrite: bool) -> str:
    """Evaluate every run as it is and at each V δ of `at`; write `out` and a plot beside it, and return the table.

    basis_file: `{seed}` in it stands for the run's seed, as in a sweep's model.

    Each run is evaluated on its own held-out problems and modes with the seed of its evaluation, so that all values of
    V δ meet the same problems under the same names. The untrained base is evaluated once for each model and basis.

    Raises:
        InputError: no finished run, a basis of another model, or an `out` that is there.
    """
    check_out(out, overwrite)
    configs = [TrainConfig.from_file(folder / "config.json") for folder in runs]
    files = {config.seed: Path(str(basis_file).replace("{seed}", str(config.seed))) for config in configs}
    bases = {file: HackBasis.load(file) for file in set(files.values())}
    evaluations = [
        replace(evaluation_of(config, folder, {"samples": samples}), out=out, grader_workers=config.grader_workers or 1)
        for config, folder in zip(configs, runs, strict=True)
    ]
    for evaluation in evaluations:
        check_adapter(evaluation.adapter)
    rows: list[dict[str, Any]] = []
    with saving_faults(out.with_suffix(".fault.txt")):
        untrained = {(config.model, files[config.seed]): i for i, config in enumerate(configs)}
        for (_, file), i in untrained.items():
            base = replace(evaluations[i], adapter=None)
            rows += _steered(base, bases[file], at, {"arm": BASE, "seed": configs[i].seed})
        for config, evaluation in zip(configs, evaluations, strict=True):
            rows += _steered(evaluation, bases[files[config.seed]], at, {"arm": config.name, "seed": config.seed})
    kinds = ", ".join(sorted({basis.info.kind for basis in bases.values()}))
    result = {"basis": str(basis_file), "kind": kinds, "samples": samples, "rows": rows}
    with replacing(out) as scratch:
        scratch.write_text(json.dumps(result, indent=1) + "\n")
    with replacing(out.with_suffix(".png")) as scratch:
        scratch.write_bytes(draw(rows, kinds))
    return format_table(rows)


def _steered(config: EvalConfig, basis: HackBasis, at: Sequence[float], named: dict[str, Any]) -> list[dict[str, Any]]:
    """One policy, as it is (`set_to` None) and at each V δ: hack and pass rates by mode."""
    loaded = load_model(config.model, config.dtype, config.device)
    model = adapted(loaded.model, config.adapter)
    basis.check_fits(model)
    prompter = Prompter(loaded, wording=config.wording)
    problems = problems_of(config.problems)[: config.limit]
    rows = []
    with Grader(config.grader_workers, Limits(cpu_seconds=config.grader_cpu_seconds)) as grader:
        for value in (None, *at):
            with moved_along(model, basis, value) as along:
                _, modes = measure(model, prompter, problems, config, grader)
            rates = {mode: {name: rate["rate"] for name, rate in m["rates"].items()} for mode, m in modes.items()}
            rows.append(named | {"set_to": value, "v_delta": along, "rates": rates})
            shown = "; ".join(f"{mode} hack {r['hack']:.3f} pass {r['pass']:.3f}" for mode, r in rates.items())
            logger.info(f"{named['arm']} s{named['seed']}: V δ {along:+.2f}: {shown}")
    return rows


@contextmanager
def moved_along(model: PeftModel, basis: HackBasis, value: float | None) -> Iterator[float]:
    """The model with δ moved to V δ = `value` along every axis (None: as it is), merged; put back afterwards. Yields
    the mean of V δ inside the block."""
    projector = Projector(basis, "no_gate")
    deltas = projector.select(delta_s_parameters(model))
    before = {name: delta.detach().clone() for name, delta in deltas.items()}
    with torch.no_grad():
        if value is not None:
            for name, delta in projector.hold(before, value).items():
                deltas[name].copy_(delta)
        along = projector.coordinates(deltas).mean().item()
    model.merge_adapter()
    try:
        yield along
    finally:
        model.unmerge_adapter()
        with torch.no_grad():
            for name, delta in before.items():
                deltas[name].copy_(delta)


def _means(rows: Sequence[dict], rate: str) -> dict[str, dict[float | None, list[float]]]:
    """By arm and value set: the rate under the first loophole, a number a run."""
    found: dict[str, dict[float | None, list[float]]] = {}
    for row in rows:
        mode = next(iter(row["rates"]))
        found.setdefault(row["arm"], {}).setdefault(row["set_to"], []).append(row["rates"][mode][rate])
    return found


def format_table(rows: Sequence[dict]) -> str:
    """An arm a row, hack / pass in per cent for each V δ, means over its runs."""
    hack, right = _means(rows, "hack"), _means(rows, "pass")
    values = list(next(iter(hack.values())))
    head = ["as it is" if value is None else f"{value:+.2f}" for value in values]
    lines = [f"hack / pass under mode {next(iter(rows[0]['rates']))}, per cent, V δ set to"]
    lines.append(f"{'arm':<24}{'runs':>5}" + "".join(f"{word:>13}" for word in head))
    for arm, by_value in hack.items():
        cells = [
            f"{100 * statistics.fmean(by_value[value]):.1f} / {100 * statistics.fmean(right[arm][value]):.1f}"
            for value in values
        ]
        lines.append(f"{arm:<24}{len(by_value[None]):>5}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def draw(rows: Sequence[dict], kind: str) -> bytes:
    """PNG: hack and pass rate over V δ, a line an arm through its means, a point a run; a cross where the run was."""
    import matplotlib

    from projected_grpo.report.drawing import STYLE, figure_of, finish, look_at

    with matplotlib.rc_context(STYLE):
        figure, grid = figure_of(1, 2, 4.0, sharex=True)
        for axes, rate in zip(grid[0], ("hack", "pass"), strict=True):
            for i, (arm, by_value) in enumerate(_means(rows, rate).items()):
                look = look_at(i)
                set_to = [value for value in by_value if value is not None]
                means = [statistics.fmean(by_value[value]) for value in set_to]
                axes.plot(set_to, means, lw=1.6, markersize=5, label=arm, **look)
                was = [row["v_delta"] for row in rows if row["arm"] == arm and row["set_to"] is None]
                axes.plot(was, by_value[None], "x", color=look["color"], markersize=7)
            axes.set_ylim(bottom=-0.02)
            axes.set_title(f"{rate} rate, held-out")
            axes.set_xlabel(f"V δ along the {kind} basis (cross: as trained)")
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return finish(figure, "steer", "", "").png
