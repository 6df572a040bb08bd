"""A real process that is killed, at twenty moments drawn at random, and goes on to the same end, bit for bit.

Half of the moments are drawn over the time that the run takes, so that most fall inside of steps; half over the
openings, renamings and removals of files in the run's folder, so that they fall where something is being written.
"""

import gzip
import json
import multiprocessing as mp
import os
import random
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from projected_grpo.run import train
from projected_grpo.steplog import read_metrics

FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
REUSE = {"steps_per_generation": 2, "num_iterations": 2, "prompts_per_step": 1, "vhack_refresh_every": 2, "beta": 0.01}
KILLS = 10
"""Kills of each of two kinds of run; every third run is killed once more after its first resume."""


def go(config, counted_to, die_at):
    """The run in a process of its own; it dies at its `die_at`-th touch of a file in the run's folder."""
    touched, folder = 0, str(config.run_dir)

    def note(event, args):
        nonlocal touched
        if event in FILE_EVENTS and isinstance(args[0], str | os.PathLike) and str(args[0]).startswith(folder):
            touched += 1
            if touched == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(note)
    torch.set_num_threads(1)
    train(config)
    if counted_to is not None:
        counted_to.write_text(str(touched))


@pytest.fixture(scope="module")
def processes():
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["projected_grpo.run", __name__])
    return context


def left_by(config):
    """All that a run leaves behind but for what measures the machine."""
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    with gzip.open(config.run_dir / "rollouts.jsonl.gz", "rt") as file:
        rollouts = [json.loads(line) for line in file]
    metrics = [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]
    basis = (config.run_dir / "basis.safetensors").read_bytes()
    return metrics, rollouts, basis, load_file(config.run_dir / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", [{}, REUSE], ids=["on-policy", "reused rollouts, refresh, KL"])
def test_a_run_killed_at_any_moment_ends_as_one_that_nobody_touched(processes, small_config, tmp_path, kind):
    whole = replace(small_config, steps=6, save_every=2, **kind)
    counts = tmp_path / "touched"
    began = time.monotonic()
    process = processes.Process(target=go, args=(whole, counts, None))
    process.start()
    process.join()
    took = time.monotonic() - began
    assert process.exitcode == 0
    metrics, rollouts, basis, adapter = left_by(whole)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]

    draw, died, number = random.Random(20261127), 0, 0
    while died < KILLS:  # a moment may lie past the end of a run that was faster than the first
        config = replace(whole, out_root=tmp_path / f"killed-{number}")
        for kill in range(1 + (number % 3 == 2)):
            # A resumed run is shorter, so its moment is drawn over the first half.
            die_at = draw.randint(1, int(counts.read_text()) // (1 + kill)) if number % 2 else None
            wait = draw.uniform(0, took / (1 + kill)) if die_at is None else None
            process = processes.Process(target=go, args=(as_it_stands(config), None, die_at))
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
        again = left_by(config)
        assert again[:3] == (metrics, rollouts, basis), number
        assert again[3].keys() == adapter.keys()
        assert all(torch.equal(again[3][name], adapter[name]) for name in adapter), number
        number += 1
        assert number < 3 * KILLS


def as_it_stands(config):
    """What a person types next."""
    begun = (config.run_dir / "config.json").is_file()
    return replace(config, resume=begun, overwrite=not begun)
