"""The report as one HTML file that needs nothing else, and as Markdown: the same verdict, tables and plots."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from projected_grpo.report.drawing import Plot
from projected_grpo.report.table import Table


@dataclass(frozen=True)
class Contents:
    """What both files hold. `verdicts`: (outcome, sentence). `sections`: (title, tables)."""

    title: str
    headlines: Sequence[str]
    verdicts: Sequence[tuple[str, str]]
    controls: Sequence[str]
    main: Table
    plots: Sequence[Plot]
    sections: Sequence[tuple[str, Sequence[Table]]]
    provenance: Sequence[tuple[str, str]]


def html(contents: Contents) -> str:
    """Plots go in as base64 SVG: nothing is fetched, and the ids of two plots cannot collide."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    images = {plot.key: base64.b64encode(plot.svg).decode() for plot in contents.plots if plot.why_not is None}
    return environment.get_template("page.html.j2").render(c=contents, images=images)


def markdown(contents: Contents) -> str:
    """Plots are linked, as plots/*.png beside the file."""
    lines = [f"# {contents.title}", "", "## Verdict", "", *(f"{line}\n" for line in contents.headlines)]
    lines += [f"- {sentence}" for _, sentence in contents.verdicts]
    if contents.controls:
        lines += ["", "Controls:", "", *(f"- {sentence}" for sentence in contents.controls)]
    lines += ["", *_section(contents.main), "## Plots", ""]
    for plot in contents.plots:
        if plot.why_not is None:
            lines += [f"### {plot.title}", "", f"![{plot.title}](plots/{plot.key}.png)", "", plot.caption, ""]
        else:
            lines += [f"### {plot.title}", "", f"Not drawn: {plot.why_not}.", ""]
    for title, tables in contents.sections:
        lines += [f"## {title}", ""]
        for table in tables:
            lines += _section(table)
    lines += ["## Provenance", "", *(f"- {name}: `{value}`" for name, value in contents.provenance)]
    return "\n".join(lines) + "\n"


def _section(table: Table) -> list[str]:
    body = [table.markdown(), ""] if table.rows else []
    return [f"### {table.title}", "", *body, *(line for note in table.notes for line in (note, ""))]
