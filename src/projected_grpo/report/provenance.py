"""Where the numbers come from: every run that was started, every setting, the command, version and commit."""

from projected_grpo.report.compare import Study
from projected_grpo.report.settings import departures, runs_of, setting, values_of, varying
from projected_grpo.report.table import NONE, Table

SETTINGS = (
    "preset",
    "model",
    "dtype",
    "problems",
    "modes",
    "wording",
    "steps",
    "prompts_per_step",
    "group_size",
    "mix_ratio",
    "learning_rate",
    "beta",
    "max_completion_length",
    "temperature",
    "top_p",
    "pairs",
    "n_pairs",
    "n_pairs (of the basis)",
    "pairs_by_seed",
    "pairs_without",
    "v_hack_k",
    "drop_bottom_frac",
    "gate",
    "overshoot",
    "project_target",
    "hold_rate",
    "hold_cap",
    "update_metric",
    "project_rows",
    "preserve_magnitude",
    "vhack_refresh_every",
)


def run_table(study: Study) -> Table:
    """Every run that was started, compared or not."""
    rows = []
    for run in study.runs:
        remarks = "; ".join(run.remarks) or NONE
        state = f"left out: {run.left_out}" if run.left_out else "compared"
        rows.append(
            [run.name, run.kind, str(run.seed), f"{run.reached} of {run.steps}", state, remarks, str(run.folder)]
        )
    head = ["arm", "kind", "seed", "steps", "state", "remarks", "folder"]
    note = "Every run that was started and is in the folders given; those left out are in no mean."
    return Table("runs", "Runs", head, rows, [note], words=True)


def settings_table(study: Study) -> Table:
    """What all compared runs share, and where an arm has another value than vanilla (or than the first arm)."""
    arms = [arm for arm in study.arms.values() if arm.runs]
    runs = [run for arm in arms for run in runs_of(arm)]
    rows = []
    for name in SETTINGS:
        values = values_of(runs, name)
        if len(values) < 2:
            rows.append([name, values[0] if values else NONE, "all arms"])
            continue
        for value in values:
            having = [arm.name for arm in arms if value in values_of(runs_of(arm), name)]
            rows.append([name, value, ", ".join(having)])
    seeds = [f"{arm.name}: seeds {', '.join(map(str, sorted(arm.runs)))}." for arm in arms]
    return Table("settings", "Settings", ["setting", "value", "of"], rows, seeds, words=True)


def departures_table(study: Study) -> Table:
    """Settings in which runs of one arm differ, and in which an arm departs from vanilla."""
    rows = []
    for arm in study.arms.values():
        for name, values in varying(arm).items():
            by_value = [
                f"{value} (seeds {', '.join(str(run.seed) for run in runs_of(arm) if setting(run, name) == value)})"
                for value in values
            ]
            rows.append([arm.name, name, "within the arm", "; ".join(by_value)])
        other = study.references.get(arm.name, study.vanilla)
        if other is not None and arm is not other:
            for name, (theirs, ours) in departures(arm, other).items():
                rows.append([arm.name, name, f"{other.name}: {theirs}", ours])
    notes = ["Seeds, names, and where files lie are left out of this table."]
    if not rows:
        notes = [
            "No two runs of one arm differ in a setting, and no arm differs from vanilla in any but the arm itself."
        ]
    return Table("departures", "Departures", ["arm", "setting", "against", "value"], rows, notes, left=4, words=True)
