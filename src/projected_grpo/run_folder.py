"""A run's folder while it is written: who may write into it, what a resume finds there, and the file of rollouts."""

import gzip
import json
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from projected_grpo import processes
from projected_grpo.config import TrainConfig
from projected_grpo.errors import InputError
from projected_grpo.paths import replacing
from projected_grpo.run_state import (
    LAST_FILE,
    checkpoints,
    contents,
    differing,
    last_checkpoint,
    locked,
    note_start,
    refuse_in_use,
)
from projected_grpo.trainer import STATE_FILE


def checkpoint_to_resume(config: TrainConfig, folder: Path) -> Path | None:
    """The same for all processes; from here on the folder holds no trained run, and no checkpoint after that one.

    Raises:
        InputError: it was written by another number of processes, or there are several and none is whole.
    """
    found: list[Path | None] = []

    def look() -> None:
        checkpoint = last_checkpoint(folder, config.steps) if config.resume else None
        written, now = _n_processes_of(checkpoint), processes.world_size()
        if checkpoint is not None and written != now:
            raise InputError(
                f"--resume: {checkpoint} was written by {written} processes and this is {now}; start as many, since "
                "each goes on with its own rows and random numbers"
            )
        found.append(checkpoint)

    processes.refused_by_main(look)
    checkpoint = processes.from_main(found[0] if found else None)
    if processes.is_main():
        (folder / LAST_FILE).unlink(missing_ok=True)
        start = -1 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        for step, path in checkpoints(folder).items():
            if step > start:  # it is written again, and must not be mixed with what lies there
                shutil.rmtree(path)
    return checkpoint


def _n_processes_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else len(list(checkpoint.glob(STATE_FILE.format("*"))))


class RolloutFile:
    """Appends every generation's labelled rollouts; rows after `start_step`, and what a kill has torn, go first."""

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        if path.exists():
            kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= start_step]
            with replacing(path) as scratch, gzip.open(scratch, "wt") as file:
                file.writelines(kept)

    def __call__(self, rows: list[dict]) -> None:
        with gzip.open(self.path, "at") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def rollouts_until(path: Path, step: int) -> Iterator[dict]:
    """Those of the steps that are done, of a run that is resumed."""
    if step and path.exists():
        yield from (row for row in map(json.loads, _whole_lines(path)) if row["step"] <= step)


def _whole_lines(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt") as file, suppress(EOFError, gzip.BadGzipFile, zlib.error):
        yield from (line for line in file if line.endswith("\n"))


def check_folder(config: TrainConfig) -> None:
    """Refuse a folder that is in use, holds another run, or, for a resume, holds none."""
    _check_contents(config)
    refuse_in_use(config.run_dir)


def _check_contents(config: TrainConfig) -> None:
    folder, existing = config.run_dir, config.run_dir / "config.json"
    if config.resume:
        if not existing.is_file():
            raise InputError(f"--resume: {folder} holds no run; start it without --resume")
        if names := differing(TrainConfig.from_file(existing), config):
            raise InputError(f"--resume: {existing} has another {names[0]}; resume with --config {existing}")
    elif folder.exists() and contents(folder) and not config.overwrite:
        raise InputError(f"{folder} exists; add --overwrite to replace it, --resume to go on, or another --out-root")


@contextmanager
def run_folder(config: TrainConfig) -> Iterator[Path]:
    """The run's folder, made or emptied, locked, with its config.json; by the first process."""
    folder = config.run_dir
    if not processes.is_main():
        processes.wait()
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _check_contents(config)  # another run may have come and gone while this one was loading
        if not config.resume:
            # What a killed run would go on from goes first, and last what says that there is one.
            first_to_last = sorted(contents(folder), key=lambda e: (e.name != "checkpoints", e.name == "config.json"))
            for entry in first_to_last:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            with replacing(folder / "config.json") as scratch:
                scratch.write_text(replace(config, overwrite=False).to_json())
        note_start(folder, processes.world_size())
        processes.wait()
        yield folder
