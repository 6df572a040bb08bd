"""Experiment trackers: every number of `metrics.jsonl` under `metrics/`, and each step's rollouts as a table.

The numbers go out by Trainer's own integrations, which TRL fills; only the tables, with our labels, are sent from here.
The trackers' packages are optional (`projected-grpo[trackers]`) and asked for by name with `--report-to`.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from projected_grpo.config import Tracker
from projected_grpo.errors import InputError

PREFIX = "metrics/"
TABLE = "rollouts"
COLUMNS = ("step", "problem_id", "mode", "source", "label", "reward", "advantage", "completion")


def check_trackers(names: Sequence[Tracker]) -> None:
    """Raises InputError for one that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise InputError(f"--report-to {name}: it is not installed; install projected-grpo[trackers]")


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Of a row of metrics, under the names that trackers get; what is null there is left out."""
    return {f"{PREFIX}{name}": float(value) for name, value in row.items() if isinstance(value, int | float)}


class RolloutTables:
    """Sends a step's labelled rollouts to each tracker, in its own kind of table. `folder`: TensorBoard's."""

    def __init__(self, names: Sequence[Tracker], folder: Path) -> None:
        self.names = names
        if "tensorboard" in names:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        cells = [[row[column] for column in COLUMNS] for row in rows]
        if "wandb" in self.names:
            import wandb

            wandb.log({TABLE: wandb.Table(columns=list(COLUMNS), data=cells)}, commit=False)
        if "trackio" in self.names:
            import pandas as pd
            import trackio

            trackio.log({TABLE: trackio.Table(dataframe=pd.DataFrame(cells, columns=list(COLUMNS)))})
        if "tensorboard" in self.names:
            self._writer.add_text(TABLE, markdown(cells), rows[0]["step"])
            self._writer.flush()


def markdown(cells: Sequence[Sequence[Any]]) -> str:
    """TensorBoard's tables are Markdown; a completion keeps its lines."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    return "\n".join([*lines, *(" | ".join(map(_cell, row)) for row in cells)])


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    for plain, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", "<br>")):
        text = text.replace(plain, written)
    return text
