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
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
LOCK = ".lock"
LAST_FILE = "basis.safetensors"
"""What a trained run's folder is given last: with it the rest is whole."""
NOT_COMPARED = {"resume", "overwrite", "grader_workers", "report_to", "vllm_server", "vllm_gpu_memory"}
EVAL_NOT_COMPARED = {"adapter", "out", "overwrite", "grader_workers", "device"}


def differing(saved: TrainConfig, config: TrainConfig) -> list[str]:
    """Names of the settings in which two configs would not be one run."""
    return [name for name, value in vars(saved).items() if name not in NOT_COMPARED and value != getattr(config, name)]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's folder. The lock is on a file in it, and not on the folder itself, so that on NFS the other
    machines of a cluster see it too. Raises InputError where somebody else holds it."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        for left in reversed(range(10)):  # whoever only looks holds it for a moment
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise _held(folder) from None
                time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def in_use(folder: Path) -> bool:
    """Whether a `train` holds its lock on the folder."""
    if not (folder / LOCK).is_file():
        return False
    handle = os.open(folder / LOCK, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def refuse_in_use(folder: Path) -> None:
    """Raises InputError where a `train` holds the folder."""
    if in_use(folder):
        raise _held(folder)


def _held(folder: Path) -> InputError:
    return InputError(f"{folder} is in use by another run; wait for it or choose another --out-root")


def contents(folder: Path) -> list[Path]:
    """What a run or anybody else has put there; not the lock, nor what a kill left half written."""
    return [path for path in folder.iterdir() if path.name != LOCK and path.suffix != ".tmp"]


def checkpoints(folder: Path) -> dict[int, Path]:
    """By step, whole or not."""
    return {int(path.name.rpartition("-")[2]): path for path in (folder / "checkpoints").glob("checkpoint-*")}


def last_checkpoint(folder: Path, steps: int) -> Path | None:
    """The newest checkpoint before the last step that was sealed and has not changed since: a trainer resumed at the
    last step would do one more. None where there is none, or only one that a kill has torn: the run begins anew.

    Raises:
        InputError: there are several and none is whole, which no kill does.
    """
    found = [(step, path) for step, path in sorted(checkpoints(folder).items(), reverse=True) if step < steps]
    for _, path in found:
        if is_whole(path):
            return path
        logger.warning(f"{path} was not written to its end, or is damaged; going on from the one before it")
    if len(found) > 1:
        raise InputError(
            f"{folder / 'checkpoints'} holds {len(found)} checkpoints and none is whole: damaged, or of an older "
            "version; move the run away, or start it again with --overwrite"
        )
    return None


def note_start(folder: Path, n_processes: int) -> None:
    """Add to the run's starts: when, by which code, with which command and in how many processes."""
    this = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code_version(),
        "command": shlex.join(["projected-grpo", *sys.argv[1:]]),
        "processes": n_processes,
    }
    read_starts(folder)  # refuses a damaged file
    before = json.loads((folder / STARTS).read_text()) if (folder / STARTS).is_file() else []
    with replacing(folder / STARTS) as scratch:
        scratch.write_text(json.dumps([*before, this], indent=1) + "\n")


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
    if not folder.exists() or (folder.is_dir() and not contents(folder)):
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
    refuse_in_use(folder)
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
