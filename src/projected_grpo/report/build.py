"""The `report` command: run folders to report.html, report.md, report.json and plots/."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from projected_grpo.errors import InputError
from projected_grpo.report import plots, verdict
from projected_grpo.report.compare import Arm, Paired, Study, compare_all, make_study
from projected_grpo.report.drawing import Plot
from projected_grpo.report.kinds import kind_tables
from projected_grpo.report.mechanism import displacement_table, displacements, prediction_table, predictions, step_table
from projected_grpo.report.observe import Measure, observe_all
from projected_grpo.report.page import Contents, html, markdown
from projected_grpo.report.provenance import departures_table, run_table, settings_table
from projected_grpo.report.runs import find_runs, from_here
from projected_grpo.report.tables import (
    against_tables,
    control_table,
    curves_table,
    difference_tables,
    main_table,
    power_table,
    rate_tables,
    rates_of,
)
from projected_grpo.version import code_version

FILES = ("report.html", "report.md", "report.json")


def write_report(roots: Sequence[Path], out: Path, overwrite: bool, command: str, against: str | None = None) -> str:
    """Read the runs, write the report into the folder `out`, and return the verdict and the main table as text.

    `against`: an arm with which all others are compared too, beside vanilla.

    Raises:
        InputError: no runs, two that are one, a damaged config.json, no arm `against`, or an `out` that holds a report
            already.
    """
    _check_out(out, overwrite)
    runs, observed = observe_all(find_runs(roots))
    study = make_study(runs, observed)
    if against is not None and against not in study.arms:
        raise InputError(f"--against {against!r} is no arm of these runs; there are {', '.join(study.arms)}")
    comparisons = compare_all(study.pairs, study.measures())
    of_controls = _compare_controls(study)
    verdicts = verdict.judge(study, comparisons, of_controls)
    controls = verdict.judge_controls(study, of_controls)
    power, power_numbers = power_table(study, comparisons)
    kinds, kind_differences = kind_tables(study)
    main = main_table(study, comparisons, verdicts)
    curves = curves_table(study)
    moved, predicted = displacements(study), predictions(study)
    second = _compare_with(study, against) if against is not None else {}
    mechanism = [displacement_table(study, moved), step_table(study), prediction_table(predicted)]
    drawn = plots.draw_all(study, comparisons, moved)
    differences = difference_tables(study, comparisons)
    if against is not None:
        differences += against_tables(study, second, against)
    provenance = [("command", command), ("code of this report", code_version())]
    codes = {code for run in runs if run.left_out is None for code in run.code or ("unknown",)}
    provenance += [("code of the runs", code) for code in sorted(codes)]
    provenance += [("runs", str(from_here(root))) for root in roots]
    contents = Contents(
        title=f"Report: {runs[0].config['preset']}, {len(runs)} runs of {len(study.arms)} arms",
        headlines=verdict.headlines(study),
        verdicts=[(one.outcome, one.sentence()) for one in verdicts],
        controls=[one.sentence() for one in controls],
        main=main,
        plots=drawn,
        sections=[
            ("Rates", [*rate_tables(study), curves]),
            ("Differences", [*differences, control_table(study, controls), power]),
            *([("Kinds of hacks", kinds)] if kinds else []),
            *([("Mechanism", tables)] if (tables := [table for table in mechanism if table]) else []),
            ("Runs and settings", [run_table(study), settings_table(study), departures_table(study)]),
        ],
        provenance=provenance,
    )
    numbers = {
        "verdicts": [asdict(one) for one in verdicts],
        "controls": [
            {"control": c.control, "real": c.real, "overrun": c.overrun, "reasons": c.reasons, **_paired(c.paired)}
            for c in controls
        ],
        "headlines": contents.headlines,
        "rates": rates_of(study),
        "differences": [_paired(paired) for paired in comparisons.values()],
        "against": [_paired(paired) for paired in second.values()],
        "kind_differences": [_paired(paired) for paired in kind_differences],
        "power": power_numbers,
        "displacements": {folder: asdict(one) for folder, one in moved.items()},
        "predictions": [asdict(one) for one in predicted],
        "runs": [_run(run) for run in runs],
        "tables": {table.key: asdict(table) for _, tables in contents.sections for table in tables}
        | {"main": asdict(main)},
        "plots": {plot.key: plot.why_not or f"plots/{plot.key}.svg" for plot in drawn},
        "provenance": provenance,
    }
    _write(out, contents, numbers, drawn)
    sentences = [*contents.headlines, *(s for _, s in contents.verdicts), *contents.controls]
    return "\n".join([*sentences, "", main.markdown(), *main.notes, "", curves.markdown()])


def _compare_controls(study: Study) -> dict[tuple[str, str], Paired]:
    """Control minus real basis in hack rate; Holm over the controls of one real basis."""
    by_real: dict[str, list[Arm]] = {}
    for control, real in verdict.control_pairs(study):
        by_real.setdefault(real.name, []).append(control)
    measure = study.main("hack")
    return {
        (name, real): paired
        for real, controls in by_real.items()
        for (name, _), paired in compare_all([(c, study.arms[real]) for c in controls], [measure]).items()
    }


def _compare_with(study: Study, against: str) -> dict[tuple[str, Measure], Paired]:
    """Every other arm minus the arm `against`, in all measures; Holm over the arms."""
    reference = study.arms[against]
    others = [arm for arm in study.arms.values() if arm is not reference and arm.runs]
    return compare_all([(arm, reference) for arm in others], study.measures())


def _paired(paired: Paired) -> dict[str, Any]:
    extra = {"mean": paired.mean, "sd": paired.sd, "standard_error": paired.standard_error, "interval": paired.interval}
    return asdict(paired) | {"measure": paired.measure._asdict()} | extra


def _run(run) -> dict[str, Any]:
    return {
        "arm": run.name,
        "kind": run.kind,
        "seed": run.seed,
        "folder": str(run.folder),
        "reached": run.reached,
        "steps": run.steps,
        "left_out": run.left_out,
        "remarks": run.remarks,
        "config": run.config,
        "basis": run.basis_info,
    }


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is no folder; name a folder")
    if not overwrite and any((out / name).exists() for name in FILES):
        raise InputError(f"--out {out} holds a report; choose another folder or add --overwrite")


def _write(out: Path, contents: Contents, numbers: dict, drawn: Sequence[Plot]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for plot in drawn:  # one that is not drawn now may lie there from the report that is replaced
            for suffix in ("png", "svg"):
                (out / "plots" / f"{plot.key}.{suffix}").unlink(missing_ok=True)
        plots.save(drawn, out / "plots")
        texts = (html(contents), markdown(contents), json.dumps(numbers, indent=1, allow_nan=False) + "\n")
        for name, text in zip(FILES, texts, strict=True):
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error.strerror}); choose another folder") from error
