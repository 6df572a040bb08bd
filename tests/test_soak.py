"""Two thousand steps on a small model: what a run holds and writes must not grow but for one row a step."""

import gc
import itertools
import os
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import psutil
import pytest

from projected_grpo.run import train
from projected_grpo.steplog import StepLog, read_metrics

STEPS, EVERY = 2000, 20
SETTLED = STEPS // 4
"""By then allocators and caches have what they will ever have."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_descriptors_and_processes_stay_and_the_log_grows_by_rows(small_config, monkeypatch):
    seen = []
    process, row = psutil.Process(), StepLog.row
    log = small_config.run_dir / "metrics.jsonl"

    def noted(self, metrics):
        row(self, metrics)
        if metrics["step"] % EVERY == 0:
            gc.collect()
            children = process.children(recursive=True)
            seen.append(
                {
                    "step": metrics["step"],
                    "memory": process.memory_info().rss,
                    "descriptors": process.num_fds(),
                    "children": len(children),
                    "zombies": sum(child.status() == psutil.STATUS_ZOMBIE for child in children),
                    "log": os.path.getsize(log),
                }
            )

    monkeypatch.setattr(StepLog, "row", noted)
    config = replace(
        small_config,
        steps=STEPS,
        prompts_per_step=1,
        group_size=4,
        micro_batch=4,
        max_completion_length=12,
        rollout_grad_every=200,
        vhack_refresh_every=200,
        save_every=500,
    )
    train(config)
    assert [row["step"] for row in read_metrics(log)] == list(range(1, STEPS + 1))
    settled = [one for one in seen if one["step"] > SETTLED]
    half = len(settled) // 2
    early, late = settled[:half], settled[half:]

    def mean(rows, key):
        return fmean(one[key] for one in rows)

    assert mean(late, "memory") < 1.02 * mean(early, "memory")
    assert {one["descriptors"] for one in settled} == {settled[0]["descriptors"]}
    assert max(one["children"] for one in settled) == settled[0]["children"]
    assert not any(one["zombies"] for one in seen)
    per_row = [(b["log"] - a["log"]) / (b["step"] - a["step"]) for a, b in itertools.pairwise(settled)]
    assert max(per_row) < 1.2 * fmean(per_row)
    states = [checkpoint_size(config.run_dir, step) for step in (500, 2000)]
    assert states[1] < 1.01 * states[0]  # Trainer's own history would grow in them


def checkpoint_size(run: Path, step: int) -> int:
    return sum(path.stat().st_size for path in (run / "checkpoints" / f"checkpoint-{step}").iterdir())
