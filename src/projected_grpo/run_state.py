"""What a run's folder says of itself without torch: is it the run that is wanted, and how far did it come?

A run is done when it is trained and evaluated, as wanted; one with a whole checkpoint can be resumed; one with neither
starts again. A folder that holds anything else is refused and never emptied.
"""

import fcntl
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from loguru import logger

from projected_grpo.cli_options import copy_fields
from projected_grpo.config import EvalConfig, TrainConfig
from projected_grpo.errors import InputError
from projected_grpo.paths import is_whole, replacing
from projected_grpo.version import code_version

State = Literal["done", "evaluate", "resume", "start"]
STARTS = "starts.json"
LAST_FILE = "basis.safetensors"
"""What a trained run's folder is given last: with it the rest is whole."""
NOT_COMPARED = {"resume", "overwrite", "grader_workers", "report_to"}
EVAL_NOT_COMPARED = {"adapter", "out", "overwrite", "grader_workers", "device"}


def differing(saved: TrainConfig, config: TrainConfig) -> list[str]:
    """Names of the settings in which two configs would not be one run."""
    return [name for name, value in vars(saved).items() if name not in NOT_COMPARED and value != getattr(config, name)]


def last_checkpoint(folder: Path, steps: int) -> Path | None:
    """The newest checkpoint before the last step that was sealed and has not changed since: a trainer resumed at the
    last step would do one more."""
    found = {int(path.name.rpartition("-")[2]): path for path in (folder / "checkpoints").glob("checkpoint-*")}
    for step, path in sorted(found.items(), reverse=True):
        if step < steps and is_whole(path):
            return path
        if step < steps:
            logger.warning(f"{path} was not written to its end, or is damaged; going on from the one before it")
    return None


def note_start(folder: Path, n_processes: int) -> None:
    """Add to the run's starts: when, by which code, with which command and in how many processes."""
    this = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code_version(),
        "command": shlex.join(["projected-grpo", *sys.argv[1:]]),
        "processes": n_processes,
    }
    with replacing(folder / STARTS) as scratch:
        scratch.write_text(json.dumps([*read_starts(folder), this], indent=1) + "\n")


def read_starts(folder: Path) -> list[dict[str, str]]:
    """Oldest first; empty for a run of a version that did not write them down."""
    path = folder / STARTS
    if not path.is_file():
        return []
    try:
        starts = json.loads(path.read_text())
        return [{name: str(start[name]) for name in ("at", "code", "command")} for start in starts]
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); delete it") from error


def is_trained(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("adapter/adapter_config.json", LAST_FILE))


def held_out_of(problems: str) -> str:
    """The built-in problems that a policy trained on `problems` is evaluated on by default."""
    family = re.fullmatch(r"(micro|smol)-[a-z]+", problems)
    return f"{family[1]}-eval" if family else "eval"


def evaluation_of(run: TrainConfig, folder: Path, changes: Mapping[str, Any] = MappingProxyType({})) -> EvalConfig:
    """How the run in `folder` is evaluated: held out of what it trained on, in its own modes and without a loophole."""
    values: dict[str, Any] = {
        "problems": held_out_of(run.problems),
        "modes": tuple(dict.fromkeys((*run.modes, "none"))),
        "adapter": folder / "adapter",
        "out": folder / "eval.json",
        "trained_on": run.problems,
    }
    shared = copy_fields(EvalConfig, EvalConfig, run, skip={"problems", "modes", "overwrite"})
    return replace(shared, **{**values, **changes})


def state_of(config: TrainConfig, evaluation: EvalConfig) -> State:
    """How far the run of `config` came.

    Raises:
        InputError: its folder holds another run, another evaluation or no run at all, or is in use.
    """
    folder = config.run_dir
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return "start"
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is there and holds no run; move it away or choose another --out-root")
    saved = TrainConfig.from_file(folder / "config.json")
    if names := differing(saved, config):
        theirs, ours = getattr(saved, names[0]), getattr(config, names[0])
        raise InputError(
            f"{folder} holds a run with another {names[0]} ({theirs}, wanted is {ours}); move it away or choose "
            "another --out-root"
        )
    if in_use(folder):
        raise InputError(f"{folder} is in use by another run; wait for it or choose another --out-root")
    if not is_trained(folder):
        return "start" if last_checkpoint(folder, config.steps) is None else "resume"
    if not evaluation.out.is_file():
        return "evaluate"
    _check_evaluation(evaluation)
    return "done"


def _check_evaluation(wanted: EvalConfig) -> None:
    """Refuse an eval.json that answers another question; what a later version has added is not held against it."""
    try:
        saved = json.loads(wanted.out.read_text())["config"]
        ours = json.loads(json.dumps(asdict(wanted), default=str))
        names = [name for name in ours if name not in EVAL_NOT_COMPARED and saved.get(name, ours[name]) != ours[name]]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InputError(f"{wanted.out} is no evaluation of a run; delete it to have the run evaluated again") from None
    if names:
        raise InputError(
            f"{wanted.out} was made with another {names[0]} ({saved[names[0]]}, wanted is {ours[names[0]]}); delete it "
            "to have the run evaluated again"
        )


def in_use(folder: Path) -> bool:
    """Whether a `train` holds its lock on the folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
