"""The command that turns run folders into a report."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro

from projected_grpo.cli_options import PROG, parse
from projected_grpo.errors import InputError


@dataclass(frozen=True)
class ReportOptions:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders above them: every run in them is in the report. All of one preset."""
    out: Path | None = None
    """Folder for report.html, report.md, report.json and plots/; `report` in the first of RUNS by default."""
    against: str | None = None
    """An arm with which all others are compared too, beside vanilla."""
    overwrite: bool = False
    """Replace a report that is there."""


def report(args: list[str]) -> None:
    """Tables, plots and a verdict with intervals, from run folders alone; one HTML file that needs nothing else."""
    options = parse(ReportOptions, args, "report")
    if not options.runs:
        raise InputError("report needs RUNS: run folders, or a folder above them")
    from projected_grpo.report.build import write_report

    out = options.out or options.runs[0] / "report"
    print(write_report(options.runs, out, options.overwrite, shlex.join([PROG, "report", *args]), options.against))
    print(f"wrote {out / 'report.html'}, report.md, report.json and plots/")


COMMANDS = {"report": report}
