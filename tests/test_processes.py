"""`accelerate launch --num_processes 2` of the train command, on the CPU: the same run as in one process."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_files import delta_of, rollouts_of, rows_of

from projected_grpo.errors import InputError
from projected_grpo.run import train
from projected_grpo.steplog import read_metrics

SCRIPT = Path(__file__).with_name("launched_train.py")
# --multi_gpu is what makes accelerate start more than one process; without a GPU they talk over gloo.
LAUNCH = """accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no
--dynamo_backend no --num_cpu_threads_per_process 1""".split()  # noqa: SIM905


TRLS_OWN = {"kl", "entropy"}
"""Means over micro-batches of means over tokens: they depend on which rows share a micro-batch."""


def launched(config, folder, n_processes, *more, port=29541):
    """Standard error of the command, which has to end well; its gradients are in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config.to_json())
    train = [str(SCRIPT), str(folder), "train", "--config", str(folder / "config.json"), *more]
    launcher = ["-m", *LAUNCH, "--main_process_port", str(port)] if n_processes == 2 else []
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run([sys.executable, *launcher, *train], env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "layout",
    [
        {"prompts_per_step": 2, "micro_batch": 2, "vhack_refresh_every": 2},
        {"prompts_per_step": 1, "micro_batch": 2, "project_target": "update"},
    ],
    ids=["a group a process", "a group across both"],
)
def test_two_processes_do_what_one_does(small_config, tmp_path, layout):
    one = replace(small_config, steps=4, rollout_grad_every=2, beta=0.01, **layout)
    done = launched(one, tmp_path / "one", 1)
    assert done.returncode == 0, done.stderr
    two = replace(one, out_root=tmp_path / "runs-of-two")
    done = launched(two, tmp_path / "two", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("verdict:") == 1  # one process speaks

    ours, theirs = (read_metrics(config.run_dir / "metrics.jsonl") for config in (two, one))
    assert [row["step"] for row in ours] == [1, 2, 3, 4]
    for row, other in zip(ours, theirs, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - TRLS_OWN - {key for key in row if key.startswith("time/")}:
            value = other[name]
            assert row[name] == (None if value is None else pytest.approx(value, rel=1e-3, abs=1e-6)), name
    assert rollouts_of(two) == [
        {**row, "advantage": pytest.approx(row["advantage"], abs=1e-6)} for row in rollouts_of(one)
    ]
    size, half = one.group_size, one.group_size // 2
    sources = [row["source"] for row in rollouts_of(two)]
    assert sources == (["student"] * half + ["teacher"] * half) * (len(sources) // size)
    mine, yours = delta_of(two), delta_of(one)
    largest = max(tensor.abs().max() for tensor in yours.values())
    assert largest > 0
    for name, tensor in yours.items():
        assert torch.allclose(mine[name], tensor, rtol=0, atol=1e-3 * float(largest)), name

    first, second = (torch.load(tmp_path / "two" / f"gradients_{rank}.pt") for rank in (0, 1))
    assert len(first) == 4
    for left, right in zip(first, second, strict=True):
        assert any(grad.any() for grad in left.values())
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_resume_each_where_it_was(small_config, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMPLED", "1")
    config = replace(small_config, steps=4, micro_batch=2, save_every=2, static_cache=True)
    whole = launched(config, tmp_path / "whole", 2)
    assert whole.returncode == 0, whole.stderr
    rows, rollouts = rows_of(config), rollouts_of(config)
    (config.run_dir / "basis.safetensors").unlink()
    alone = launched(config, tmp_path / "alone", 1, "--resume")
    assert alone.returncode == 2
    assert "was written by 2 processes and this is 1" in alone.stderr
    again = launched(config, tmp_path / "again", 2, "--resume")
    assert again.returncode == 0, again.stderr
    assert "dropped 2 rows of steps after 2" in again.stderr  # had it begun anew, it would end the same
    assert rollouts_of(config) == rollouts
    assert rows_of(config) == rows


def test_sharding_launchers_are_refused_with_the_reason(monkeypatch, small_config):
    for variable, name in (
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism config"),
    ):
        monkeypatch.setenv(variable, "true")
        with pytest.raises(InputError, match=f"{name} is not supported.*whole gradient"):
            train(small_config)
        monkeypatch.delenv(variable)
    assert not small_config.run_dir.exists()


def test_the_rows_of_a_step_have_to_be_shared_out_evenly(small_config, monkeypatch):
    from projected_grpo.run import grpo_config

    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match=r"--micro-batch 4 x 3 processes does not divide the step's 8 rows"):
        grpo_config(small_config, None)
