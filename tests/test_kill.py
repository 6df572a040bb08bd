"""A real process that is killed, at more than twenty moments drawn at random, and goes on to the same end, bit for bit.

The moments are of three kinds: over the time that the run takes, so that most fall inside of steps; over the openings,
renamings and removals of files in the run's folder, between two of which something is being written; and inside of
what writes, which then leaves half a file behind.
"""

import json
import multiprocessing as mp
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import peft.peft_model
import pytest
import torch
from run_files import delta_of, rollouts_of, rows_of
from safetensors.torch import load_file

from projected_grpo import basis, run_folder, steplog
from projected_grpo.run import train

FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
REUSE = {"steps_per_generation": 2, "num_iterations": 2, "prompts_per_step": 1, "vhack_refresh_every": 2, "beta": 0.01}
"""Single prompts of unequal length, so that a cache made for the prompts at hand would change with a resume."""
KILLS = 12
"""Kills of each of two kinds of run; every fourth run is killed once more after its first resume."""


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Tear:
    """Makes what writes a run's files die at its `turn`-th call, all of them counted together, with half a file there,
    or half of what was to be appended."""

    def __init__(self, turn):
        self.turn, self.calls = turn, 0
        torch.save = self.torn(torch.save, lambda _, path, **__: path)  # optimiser, generators, our own state
        peft.peft_model.safe_save_file = self.torn(peft.peft_model.safe_save_file, lambda _, path, **__: path)  # δ
        basis.save_file = self.torn(basis.save_file, lambda _, path, **__: path)
        steplog.StepLog.row = self.torn(steplog.StepLog.row, lambda log, _: log.metrics_path)
        run_folder.RolloutFile.__call__ = self.torn(run_folder.RolloutFile.__call__, lambda file, _: file.path)

    def torn(self, write, path_of):
        def torn(*args, **kwargs):
            path = Path(path_of(*args, **kwargs))
            before = path.stat().st_size if path.is_file() and path.suffix in (".jsonl", ".gz") else 0
            done = write(*args, **kwargs)
            self.calls += 1
            if self.calls == self.turn:
                path.write_bytes(path.read_bytes()[: (before + path.stat().st_size) // 2])
                die()
            return done

        return torn


def go(config, counted_to, die_at, tear=None):
    """The run in a process of its own; it dies at its `die_at`-th touch of a file in the run's folder, or inside of the
    `tear`-th writing of one. `counted_to`: where to write down how many there are of both."""
    touched, folder = 0, str(config.run_dir)

    def note(event, args):
        nonlocal touched
        if event in FILE_EVENTS and isinstance(args[0], str | os.PathLike) and str(args[0]).startswith(folder):
            touched += 1
            if touched == die_at:
                die()

    sys.addaudithook(note)
    torch.set_num_threads(1)
    writings = Tear(tear)
    train(config)
    if counted_to is not None:
        counted_to.write_text(json.dumps([touched, writings.calls]))


@pytest.fixture(scope="module")
def processes():
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["projected_grpo.run", __name__])
    return context


def left_by(config):
    """All that a run leaves behind but for what measures the machine."""
    directions = load_file(
        config.run_dir / "basis.safetensors"
    )  # its header names the code, which may be edited meanwhile
    return rows_of(config), rollouts_of(config), directions, delta_of(config)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "kind", [{}, REUSE | {"static_cache": True}], ids=["on-policy", "reused rollouts, refresh, KL, static cache"]
)
def test_a_run_killed_at_any_moment_ends_as_one_that_nobody_touched(processes, small_config, tmp_path, kind):
    whole = replace(small_config, steps=6, save_every=2, **kind)
    counts = tmp_path / "touched"
    began = time.monotonic()
    process = processes.Process(target=go, args=(whole, counts, None))
    process.start()
    process.join()
    took = time.monotonic() - began
    assert process.exitcode == 0
    metrics, rollouts, directions, adapter = left_by(whole)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]

    touches, writings = json.loads(counts.read_text())
    draw, died, number, went_on = random.Random(20261127), 0, 0, 0
    while died < KILLS:  # a moment may lie past the end of a run that was faster than the first
        config = replace(whole, out_root=tmp_path / f"killed-{number}")
        for kill in range(1 + (number % 4 == 3)):
            # A resumed run is shorter, so its moment is drawn over the first half.
            how = number % 3
            wait = draw.uniform(0, took / (1 + kill)) if how == 0 else None
            die_at = draw.randint(1, touches // (1 + kill)) if how == 1 else None
            tear = draw.randint(1, writings // (1 + kill)) if how == 2 else None
            process = processes.Process(target=go, args=(as_it_stands(config), None, die_at, tear))
            process.start()
            process.join(wait)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            died += process.exitcode == -signal.SIGKILL
        process = processes.Process(target=go, args=(as_it_stands(config), None, None))
        process.start()
        process.join()
        assert process.exitcode == 0, number
        # Had it begun from the first step each time, it would end the same.
        went_on += "rows of steps after" in (config.run_dir / "train.log").read_text()
        again = left_by(config)
        assert again[:2] == (metrics, rollouts), number
        for tensors, wanted in ((again[2], directions), (again[3], adapter)):
            assert tensors.keys() == wanted.keys(), number
            assert all(torch.equal(tensors[name], wanted[name]) for name in wanted), number
        number += 1
        assert number < 3 * KILLS
    assert went_on >= 2


def as_it_stands(config):
    """What a person types next."""
    begun = (config.run_dir / "config.json").is_file()
    return replace(config, resume=begun, overwrite=not begun)
