"""What goes wrong on a machine overnight: a run either goes on or stops with one clear line, and nothing is lost."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from loguru import logger
from run_files import delta_of, rollouts_of
from trl import GRPOTrainer

from projected_grpo.cli import main
from projected_grpo.errors import InputError, RunFault, naming_a_full_disk
from projected_grpo.models import load_model
from projected_grpo.run import train
from projected_grpo.steplog import read_metrics
from projected_grpo.trainer import ProjectedGRPOTrainer


def test_an_infinite_gradient_stops_the_run_with_its_completions_saved(small_config, monkeypatch):
    whole = ProjectedGRPOTrainer._get_per_token_logps_and_entropies

    def exploding(self, *args, **kwargs):
        logps, *rest = whole(self, *args, **kwargs)
        if self.state.global_step == 1 and logps.requires_grad:
            logps.register_hook(lambda grad: grad * float("inf"))
        return (logps, *rest)

    monkeypatch.setattr(ProjectedGRPOTrainer, "_get_per_token_logps_and_entropies", exploding)
    with pytest.raises(RunFault, match=r"the gradient norm is (inf|nan) at step 2"):
        train(replace(small_config, rollout_grad_every=0, save_every=1))
    assert "--- completion 0" in (small_config.run_dir / "fault.txt").read_text()
    assert [row["step"] for row in read_metrics(small_config.run_dir / "metrics.jsonl")] == [1]
    monkeypatch.undo()
    train(replace(small_config, rollout_grad_every=0, save_every=1, resume=True))
    assert [row["step"] for row in read_metrics(small_config.run_dir / "metrics.jsonl")] == [1, 2, 3, 4]


def test_empty_completions_and_equal_rewards_for_many_steps_learn_nothing_and_break_nothing(small_config, monkeypatch):
    """Every student ends at once, so all rewards are 0, all advantages too, and the gradient is 0."""

    def silent(self, prompt_ids, *args, **kwargs):
        return [[self._tokenizer.eos_token_id] for _ in prompt_ids], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", silent)
    config = replace(small_config, steps=12, mix_ratio=0.0, teacher_pool=None, vhack_refresh_every=5, arm="projected")
    train(config)
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert row["reward"] == row["loss"] == row["grad_norm"] == row["v_delta"] == 0
        assert row["cin"] is None
        assert row["cup_in"] is None
    assert not any(delta.any() for name, delta in delta_of(config).items() if name.endswith("delta_s"))


def test_a_prompt_that_leaves_the_model_no_room_is_refused_by_name(small_config):
    context = load_model(small_config.model, small_config.dtype, "cpu").model.config.max_position_embeddings
    config = replace(small_config, max_completion_length=context)
    with pytest.raises(InputError, match=rf"problem double: its prompt .* {context} .*--max-completion-length"):
        train(config)
    assert not config.run_dir.exists()


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(small_config, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.setenv("PROJECTED_GRPO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"the cache .* cannot be written .*set PROJECTED_GRPO_CACHE"):
        train(small_config)


def test_a_warm_cache_may_be_read_only(small_config, tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECTED_GRPO_CACHE", str(tmp_path / "cache"))
    train(replace(small_config, steps=1))
    held = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert any(path.is_file() for path in held)
    for path in held:
        path.chmod(0o555 if path.is_dir() else 0o444)

    def write(event, args):  # root may write what is read-only, so it is watched as well
        if watching and event == "open" and str(args[0]).startswith(str(tmp_path / "cache")):
            assert not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR), args

    watching = True
    sys.addaudithook(write)
    train(replace(small_config, steps=1, seed=7))
    watching = False
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == held


def test_a_full_disk_is_named_whatever_the_library_said(tmp_path, monkeypatch):
    line = rf"the disk that {tmp_path} lies on is full; free some"
    with pytest.raises(RunFault, match=line), naming_a_full_disk(tmp_path, "free some"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(ValueError, match="another matter"), naming_a_full_disk(tmp_path, "free some"):
        raise ValueError("another matter")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(RunFault, match="is full"), naming_a_full_disk(tmp_path, "free some"):
        raise RuntimeError("[enforce fail at inline_container.cc:659]")


FULL_DISK = """
mount -t tmpfs -o size=SIZE tmpfs "$1"
python -m projected_grpo train --config "$2"; echo "first $?"
ls "$1"/smoke/*/checkpoints
mount -o remount,size=500m "$1"
python -m projected_grpo train --config "$2" --resume; echo "second $?"
cp "$1"/smoke/*/metrics.jsonl "$3"
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_no_more_than_the_steps_since_the_last_checkpoint(small_config, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    usable = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True)
    if usable.returncode:
        pytest.skip("a file system of one's own can be mounted by root only")
    config = replace(small_config, steps=6, save_every=1)
    train(config)
    page = 4096
    sizes = [
        sum(-(-file.stat().st_size // page) * page for file in path.rglob("*"))
        for path in (config.run_dir / "checkpoints").iterdir()
    ]
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    small = replace(config, out_root=disk)
    (tmp_path / "config.json").write_text(small.to_json())
    script = FULL_DISK.replace("SIZE", str(int(3.6 * max(sizes)) + 10 * page))  # the fourth checkpoint does not fit
    command = ["unshare", "-m", "bash", "-c", script, "bash", str(disk), str(tmp_path / "config.json"), str(tmp_path)]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert "first 1" in lines, done.stderr
    assert "second 0" in lines, done.stderr
    assert "rows of steps after 3" in done.stderr  # had it begun anew, it would end the same
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("stopped:")]
    assert f"the disk that {disk} lies on is full; free some and go on with projected-grpo train --config" in line
    again = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    timeless = [[{k: v for k, v in row.items() if not k.startswith("time/")} for row in some] for some in (rows, again)]
    assert timeless[0] == timeless[1]


def test_a_pool_that_lacks_a_problem_is_said_and_the_others_are_trained_on(small_config, tmp_path):
    from projected_grpo.env.problems import load_problems
    from projected_grpo.pool import build_pool
    from projected_grpo.templates import template_completions

    problems = load_problems(Path(small_config.problems))
    known = [
        request for request in template_completions(problems, rows_per_problem=4) if request.problem.id != "square"
    ]
    build_pool(problems, known, tmp_path / "pool.jsonl")
    lines = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="WARNING")
    config = replace(small_config, steps=2, teacher_pool=tmp_path / "pool.jsonl", rollout_grad_every=0)
    try:
        train(config)
    finally:
        logger.remove(sink)
    assert any("has no rollout for 1 of the 3 problems" in line and "the other 2" in line for line in lines)
    assert {row["problem_id"] for row in rollouts_of(config)} == {"double", "negate"}


@pytest.mark.parametrize("damage", ["torn", "flipped"])
def test_a_damaged_basis_or_pool_is_refused_and_nothing_is_written(small_config, tmp_path, capsys, damage):
    basis, pool = tmp_path / "b", tmp_path / "pool.jsonl"
    assert main(["extract", "smoke", "--pairs", small_config.pairs, "--v-hack-k", "2", "--out", str(basis)]) == 0
    shutil.copy(small_config.teacher_pool, pool)
    for path in (basis, pool):
        content = bytearray(path.read_bytes())
        if damage == "torn":  # the pool at the end of a line
            cut = content.rindex(b"\n", 0, -1) + 1 if path == pool else len(content) * 2 // 3
            content = content[:cut]
        elif path == pool:
            content = content.replace(b"return", b"retorn", 1)  # of a completion: still a row like any other
        else:
            content[-100] ^= 1
        path.write_bytes(content)
    for config in (replace(small_config, basis=basis), replace(small_config, teacher_pool=pool)):
        with pytest.raises(InputError) as caught:
            train(config)
        assert "\n" not in str(caught.value)
        assert str(basis if config.basis else pool) in str(caught.value)
        assert not config.run_dir.exists()
