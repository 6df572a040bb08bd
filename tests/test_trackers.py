"""`--report-to`: what trackers are given, read back out of their own files; none of them is asked to go online."""

import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest

from projected_grpo.errors import InputError
from projected_grpo.steplog import read_metrics
from projected_grpo.trackers import COLUMNS, check_trackers, markdown, numbers


def test_numbers_keep_the_names_of_the_metrics_file_and_leave_out_what_is_null():
    assert numbers({"step": 3, "cin": 0.5, "cout": None, "time/step": 2.0}) == {
        "metrics/step": 3.0,
        "metrics/cin": 0.5,
        "metrics/time/step": 2.0,
    }


def test_a_table_cell_breaks_no_table():
    text = markdown([[1, "p", "run_tests", "student", "reward_hack", 3.5, -0.25, "a | b\n<b> & c"]])
    header, rule, row = text.split("\n")
    assert header.count("|") == rule.count("|") == row.count("|") == len(COLUMNS) - 1
    assert row.endswith("a &#124; b<br>&lt;b> &amp; c")


def test_a_tracker_that_is_not_installed_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr("projected_grpo.trackers.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--report-to wandb: it is not installed; install projected-grpo\[trackers\]"):
        check_trackers(["wandb"])


@pytest.mark.slow
def test_every_number_and_every_rollout_reaches_each_tracker(small_config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(small_config, steps=2, report_to=("tensorboard", "trackio", "wandb"))
    (tmp_path / "config.json").write_text(config.to_json())
    where = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-m", "projected_grpo", "train", "--config", str(tmp_path / "config.json")]
    done = subprocess.run(command, env=os.environ | where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    wanted = {f"metrics/{name}": value for name, value in rows[1].items() if value is not None}
    for own in ("lr", "kl", "entropy", "completion_length"):  # TRL's, which it sends itself
        wanted.pop(f"metrics/{own}", None)

    events = EventAccumulator(str(config.run_dir / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    sent = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    for name, value in wanted.items():
        assert sent[f"train/{name}"] == pytest.approx(value, rel=1e-5), name
    (texts,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("rollouts")]
    assert [event.step for event in events.Tensors(texts)] == [1, 2]
    table = events.Tensors(texts)[0].tensor_proto.string_val[0].decode()
    assert len(table.split("\n")) == 2 + 8

    (database,) = (tmp_path / "trackio").glob("*.db")
    names = sqlite3.connect(database).execute("select distinct run_name from metrics").fetchall()
    assert names == [(f"{config.preset}-{config.run_dir.name}",)]
    logged = [json.loads(row[0]) for row in sqlite3.connect(database).execute("select metrics from metrics")]
    numbers_of = {name: value for row in logged for name, value in row.items()}
    for name in wanted:
        assert f"train/{name}" in numbers_of
    assert sum("rollouts" in row for row in logged) == 2

    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    content = next(run.glob("*.wandb")).read_bytes()
    for name in wanted:
        assert f"train/{name}".encode() in content
    tables = sorted((run / "files" / "media" / "table").glob("rollouts_*.json"))
    assert len(tables) == 2
    saved = json.loads(tables[0].read_text())
    assert saved["columns"] == list(COLUMNS)
    assert len(saved["data"]) == 8
