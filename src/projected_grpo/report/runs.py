"""Run folders: which there are, how far each came, and which of them may stand side by side.

A run is a folder whose `config.json` names an arm and a preset. Every one that is found is in the report; those that
cannot be compared are listed with the reason and are in no mean. Configs are read as plain JSON, not as `TrainConfig`,
so that runs of older versions can be reported too. Left out on purpose: tensors other than the basis's singular values.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from projected_grpo.errors import InputError
from projected_grpo.run_state import is_trained, read_starts
from projected_grpo.steplog import Metrics, read_metrics

REAL = ("projected", "held")
"""Arms that act on the real basis."""
CONTROLS = ("random", "random_matched", "placebo_style", "placebo_wrong", "flipped")
EVAL_SETTINGS = ("problems", "limit", "samples", "modes", "wording", "temperature", "top_p", "max_completion_length")


@dataclass(frozen=True)
class Run:
    folder: Path
    config: dict[str, Any]
    metrics: list[Metrics]
    evaluation: dict[str, Any] | None
    basis_info: dict[str, Any]
    finished: bool
    left_out: str | None = None
    """Why the run is in no mean; None for one that is compared."""
    remarks: tuple[str, ...] = field(default=())
    """What is missing in a run that is compared."""
    code: tuple[str, ...] = ()
    """Version and commit of each start of it; empty for a run of an older version."""

    @property
    def name(self) -> str:
        """The arm of the tables: the run's label, or else its arm."""
        return self.config["label"] or self.config["arm"]

    @property
    def kind(self) -> str:
        return self.config["arm"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def steps(self) -> int:
        return self.config["steps"]

    @property
    def base_model(self) -> str:
        """Fingerprint of the weights that were trained: one name may stand for several of them, as `micro` does."""
        return self.basis_info.get("model_fingerprint", "")

    @property
    def reached(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0


def find_runs(roots: Sequence[Path]) -> list[Run]:
    """Every run in or below `roots`, by name and seed, with those marked that cannot be compared.

    Raises:
        InputError: no run there, a config.json that is damaged, one (arm, seed) twice, one label for two arms.
    """
    folders: dict[Path, None] = {}
    for root in roots:
        if not root.is_dir():
            raise InputError(f"RUNS {root} is no folder; give run folders or a folder above them")
        folders |= dict.fromkeys(from_here(path) for path in _run_folders(root))
    if not folders:
        raise InputError(f"no run in {', '.join(map(str, roots))}: no config.json of a run there; train one first")
    runs = [read_run(folder) for folder in folders]
    _refuse_mixtures(runs)
    runs = sorted(runs, key=lambda run: (_place(run), run.seed))
    runs = _leave_out_minority(runs, lambda run: run.config["preset"], "preset")
    runs = _leave_out_minority(runs, lambda run: run.steps, "steps")
    # A sweep may have a model for each seed; one name never stands for two sets of weights.
    runs = _leave_out_minority(runs, lambda run: run.base_model, "base model", lambda run: run.config.get("model"))
    return _mark_evaluations(runs)


def from_here(path: Path) -> Path:
    """The path without links, from the working directory where it lies below it: a report then names no machine."""
    resolved, here = path.resolve(), Path.cwd()
    return resolved.relative_to(here) if resolved.is_relative_to(here) else resolved


def _run_folders(root: Path) -> Iterator[Path]:
    for here, below, files in os.walk(root):
        below.sort()
        if "config.json" in files and _is_run_config(Path(here) / "config.json"):
            below.clear()
            yield Path(here)


def _is_run_config(path: Path) -> bool:
    """A cached model has a config.json too; one that does not parse is taken for a run's, to be refused by name."""
    try:
        config = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        return True
    return isinstance(config, dict) and {"arm", "preset"} <= config.keys()


def read_run(folder: Path) -> Run:
    """One run's folder; one with a damaged file is left out. Raises InputError where config.json itself is damaged."""
    config = _json_object(folder / "config.json")
    config = {  # what older versions could not say, and did as this
        "label": None,
        "pairs_without": [],
        "pairs_by_seed": False,
        "hold_rate": 0.0,
        "hold_cap": 0.0,
        "update_metric": "euclidean",
        "project_rows": "all",
        "vllm": "off",
        "static_cache": False,
        "modes": [config.pop("mode", "run_tests")],
        **config,
    }
    for name, kind in (("arm", str), ("preset", str), ("seed", int), ("steps", int)):
        if type(config.get(name)) is not kind:
            raise InputError(
                f"{folder / 'config.json'}: {name} {config.get(name)!r} is not of {kind.__name__}; mend it"
            )
    try:
        return _read_files(folder, config)
    except InputError as error:
        return Run(folder, config, [], None, {}, False, f"damaged: {error}")


def _read_files(folder: Path, config: dict[str, Any]) -> Run:
    metrics_path = folder / "metrics.jsonl"
    metrics = read_metrics(metrics_path) if metrics_path.is_file() else []
    finished = is_trained(folder) and len(metrics) >= config["steps"]
    reached = metrics[-1]["step"] if metrics else 0
    evaluation = _read_evaluation(folder / "eval.json") if (folder / "eval.json").is_file() else None
    return Run(
        folder,
        config,
        metrics,
        evaluation if finished else None,
        _basis_header(folder / "basis.safetensors").get("info", {}),
        finished,
        None if finished else f"unfinished: step {reached} of {config['steps']}",
        code=tuple(start["code"] for start in read_starts(folder)),
    )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg}); take the file from its run again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: no JSON object; take the file from its run again")
    return value


def _read_evaluation(path: Path) -> dict[str, Any]:
    evaluation = _json_object(path)
    samples = evaluation.get("samples")
    keys = {"problem_id", "mode", "test_func_name", "label", "completion"}
    if (
        not isinstance(samples, list)
        or not samples
        or not all(isinstance(s, dict) and keys <= s.keys() for s in samples)
    ):
        raise InputError(f"{path}: holds no samples as `projected-grpo eval` writes them; evaluate the run again")
    return evaluation


def _basis_header(path: Path) -> dict[str, Any]:
    """What the file says of itself; empty where there is no basis."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="np") as file:
            return json.loads((file.metadata() or {})["basis"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: damaged or no basis file ({error}); take it from its run again") from error


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a basis, largest first: those that were kept, and all of the pairs' gradients."""

    kept: np.ndarray
    everything: np.ndarray
    floor: float


def read_spectrum(run: Run) -> Spectrum | None:
    """Of the run's basis file; None where it has none."""
    path = run.folder / "basis.safetensors"
    header = _basis_header(path)
    if not header:
        return None
    with safe_open(path, framework="np") as file:
        parts = {
            part: [file.get_tensor(name) for name in file.keys() if name.startswith(f"{part}/")]  # noqa: SIM118
            for part in ("singular_values", "spectrum")
        }
    kept, everything = (np.sort(np.concatenate(part or [np.zeros(0)]))[::-1] for part in parts.values())
    return Spectrum(kept, everything, header["info"].get("floor", 0.0))


def _refuse_mixtures(runs: Sequence[Run]) -> None:
    seen: dict[tuple[str, str, int], Run] = {}
    kinds: dict[str, Run] = {}
    for run in runs:
        if (other := seen.setdefault((run.config["preset"], run.name, run.seed), run)) is not run:
            raise InputError(
                f"{run.name} with seed {run.seed} is there twice, in {other.folder} and {run.folder}; give one "
                "of them, or train with a --label"
            )
        if (other := kinds.setdefault(run.name, run)).kind != run.kind:
            raise InputError(
                f"label {run.name} stands for arm {other.kind} in {other.folder} and for arm {run.kind} in "
                f"{run.folder}; label them apart"
            )


def _place(run: Run) -> tuple[int, bool, str]:
    """vanilla, the real basis, the controls in the order of the spec, then the rest; labelled ones behind their arm."""
    order = ("vanilla", *REAL, *CONTROLS)
    return order.index(run.kind) if run.kind in order else len(order), run.name != run.kind, run.name


def _leave_out_minority(
    runs: list[Run], value: Callable[[Run], Any], what: str, among: Callable[[Run], Any] = lambda run: None
) -> list[Run]:
    """Finished runs with another value than most of them (`among`: of those that agree in this) are in no mean; of two
    as frequent, the greater one counts."""
    counts: dict[Any, Counter] = {}
    for run in runs:
        if run.left_out is None:
            counts.setdefault(among(run), Counter())[value(run)] += 1
    usual = {group: max(found, key=lambda one: (found[one], one)) for group, found in counts.items()}
    return [
        replace(
            run,
            left_out=f"{what}: the compared runs have {usual[among(run)]}, this one {value(run) or 'does not say'}",
            evaluation=None,
        )
        if run.left_out is None and value(run) != usual[among(run)]
        else run
        for run in runs
    ]


def _mark_evaluations(runs: list[Run]) -> list[Run]:
    """Evaluations with the settings and problems of most runs count; another one is set aside, and so it says."""
    prints = {run.folder: _eval_print(run.evaluation) for run in runs if run.evaluation is not None}
    usual = max(prints.values(), key=list(prints.values()).count) if prints else None
    marked = []
    for run in runs:
        if run.left_out is None and run.evaluation is None:
            run = replace(run, remarks=("not evaluated: no eval.json",))
        elif run.folder in prints and prints[run.folder] != usual:
            differing = [name for name in usual if usual[name] != prints[run.folder][name]]
            run = replace(
                run, evaluation=None, remarks=(f"evaluated otherwise than most ({', '.join(differing)}): set aside",)
            )
        marked.append(run)
    return marked


def _eval_print(evaluation: dict[str, Any]) -> dict[str, str]:
    config = evaluation.get("config", {})
    settings = {name: json.dumps(config.get(name)) for name in EVAL_SETTINGS}
    asked = Counter((sample["problem_id"], sample["mode"]) for sample in evaluation["samples"])
    return settings | {"the problems asked": str(sorted(asked.items()))}
