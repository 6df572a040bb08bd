"""A table of text cells, and the spelling of numbers: rates in per cent, differences in points, one decimal each."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from projected_grpo.report.stats import Interval

NONE = "-"


@dataclass(frozen=True)
class Table:
    """`left`: how many leading columns hold words; the others are right-aligned numbers, unless `words` is set."""

    key: str
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default=())
    left: int = 1
    words: bool = False

    def is_left(self, column: int) -> bool:
        return self.words or column < self.left

    def markdown(self) -> str:
        """Aligned, so that the text can be read as it stands."""
        cells = [[cell.replace("|", "/") for cell in row] for row in (self.head, *self.rows)]
        widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(self.head))]

        def line(row: Sequence[str]) -> str:
            padded = [
                c.ljust(w) if self.is_left(i) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            return "| " + " | ".join(padded) + " |"

        rule = [("-" * w) if self.is_left(i) else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
        return "\n".join([line(cells[0]), "| " + " | ".join(rule) + " |", *map(line, cells[1:])])


def percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f}"


def points(difference: float | None) -> str:
    return NONE if difference is None else f"{100 * difference:+.1f}"


def percents(interval: Interval | None) -> str:
    """Cut off at 0 and 100: t over two seeds knows nothing of what a rate can be."""
    return NONE if interval is None else " to ".join(f"{100 * min(max(end, 0.0), 1.0):.1f}" for end in interval)


def points_range(interval: Interval | None) -> str:
    """Cut off at 100 points either way."""
    return NONE if interval is None else " to ".join(f"{100 * min(max(end, -1.0), 1.0):+.1f}" for end in interval)


def p_value(p: float | None) -> str:
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"
