"""Timing of several ways to do one thing, in turn, and the table and file that say how they compare."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from projected_grpo.version import code_version


@dataclass(frozen=True)
class Timings:
    """Seconds of each case, one a round; the first case is what the others are compared with."""

    title: str
    seconds: dict[str, list[float]]
    about: dict[str, Any]
    limits: dict[tuple[str, str], float] = field(default_factory=dict)
    """The ratio that (a case, another) has to hold at most."""
    notes: tuple[str, ...] = ()

    def ratios(self, case: str, to: str) -> list[float]:
        """Within each round: what slows the machine slows both."""
        return [a / b for a, b in zip(self.seconds[case], self.seconds[to], strict=True)]

    def table(self) -> str:
        """Median and quartiles of the seconds, and of the ratios to the first case; then the limits."""
        reference = next(iter(self.seconds))
        width = max(map(len, self.seconds))
        head = f"  {'':{width}}  {'ms':>9}  {'quartiles':>19}  {'ratio':>6}  quartiles"
        lines = [self.title, "  " + ", ".join(f"{key} {value}" for key, value in self.about.items()), head]
        for case, seconds in self.seconds.items():
            low, middle, high = (1e3 * x for x in quartiles(seconds))
            least, ratio, most = quartiles(self.ratios(case, reference))
            lines.append(
                f"  {case:{width}}  {middle:9.2f}  {low:8.2f} - {high:8.2f}  {ratio:6.2f}  {least:.2f} - {most:.2f}"
            )
        for (case, to), limit in self.limits.items():
            least, ratio, most = quartiles(self.ratios(case, to))
            held = "held" if ratio <= limit else "NOT HELD"
            held += ", not resolved" if least <= limit < most else ""
            lines.append(f"  {case} / {to}: {ratio:.2f} ({least:.2f} - {most:.2f}; to hold: at most {limit:g}): {held}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def save(self, path: Path) -> None:
        """All numbers, as JSON."""
        limits = [{"case": case, "to": to, "at_most": limit} for (case, to), limit in self.limits.items()]
        content = {
            "title": self.title,
            "about": self.about,
            "code": code_version(),
            "seconds": self.seconds,
            "limits": limits,
            "notes": self.notes,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of one value, three times that."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def in_turn(
    cases: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each case in each round, the cases of a round one after the other; `warm_up` rounds go first."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for i in tqdm(range(warm_up + rounds), desc="rounds", disable=None, leave=False):
        for name, run in cases.items():
            synchronise(device)
            started = time.perf_counter()
            run()
            synchronise(device)
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def synchronise(device: torch.device) -> None:
    """Wait for what the GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict[str, Any]:
    """What the seconds were measured on."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": platform.processor() or platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
