"""Settings: what the runs of an arm share, in which they differ, and in which an arm departs from another."""

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from projected_grpo.report.runs import Run

if TYPE_CHECKING:
    from projected_grpo.report.compare import Arm

PLACES = {
    *("out_root", "overwrite", "resume", "grader_workers", "device", "save_every", "basis", "report_to"),
    *("vllm_gpu_memory", "vllm_server"),
}
"""Where things lie and how fast they go: two runs that differ in these alone are one experiment."""
NAMES = {"arm", "label", "seed", "preset", "exploratory"}
OF_THE_METHOD = {
    *("pairs", "n_pairs", "pairs_by_seed", "pairs_without", "v_hack_k", "drop_bottom_frac", "token_reduction"),
    *("gate", "overshoot", "preserve_magnitude", "project_target", "vhack_refresh_every"),
    *("hold_rate", "hold_cap", "update_metric", "project_rows"),
}
"""What an arm may have of its own and still be compared with a vanilla that has another: it does nothing there."""


def setting(run: Run, name: str) -> str:
    """A setting as text; `-` where the config of that version did not have it."""
    if name == "n_pairs (of the basis)":
        return str(run.basis_info.get("n_pairs", "-"))
    value = run.config.get(name, "-")
    if name == "model" and isinstance(value, str):  # one for each seed is one setting, as the sweep file has it
        return re.sub(rf"(?<!\d){run.seed}(?!\d)", "{seed}", value)
    return value if isinstance(value, str) else json.dumps(value)


def values_of(runs: Iterable[Run], name: str) -> list[str]:
    """The different values, in order."""
    return list(dict.fromkeys(setting(run, name) for run in runs))


def runs_of(arm: "Arm") -> list[Run]:
    return [observed.run for observed in arm.runs.values()]


def exploratory(arm: "Arm") -> bool:
    return any(run.config.get("exploratory") for run in runs_of(arm))


def varying(arm: "Arm") -> dict[str, list[str]]:
    """Settings in which the runs of one arm differ, names and seeds left out."""
    runs = runs_of(arm)
    names = _names(runs) - NAMES - PLACES
    found = {name: values_of(runs, name) for name in sorted(names)}
    return {name: values for name, values in found.items() if len(values) > 1}


def departures(arm: "Arm", reference: "Arm") -> dict[str, tuple[str, str]]:
    """Settings in which an arm is not as the reference is: (reference's, arm's)."""
    ours, theirs = runs_of(arm), runs_of(reference)
    if not ours or not theirs:
        return {}
    found = {}
    for name in sorted((_names(ours) | _names(theirs)) - NAMES - PLACES):
        here, there = values_of(ours, name), values_of(theirs, name)
        if sorted(here) != sorted(there):
            found[name] = (", ".join(there), ", ".join(here))
    return found


def same_settings(arm: "Arm", reference: "Arm") -> bool:
    """Whether nothing but the arm differs; random directions have nothing to refresh."""
    free = {"vhack_refresh_every"} if arm.kind.startswith("random") else set()
    return departures(arm, reference).keys() <= free


def _names(runs: Iterable[Run]) -> set[str]:
    return {name for run in runs for name in run.config} - {"rollout_grad_every"}
