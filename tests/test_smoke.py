"""The whole chain through the real command line, as `just smoke` runs it."""

import json

import pytest

from projected_grpo.cli import main
from projected_grpo.steplog import read_metrics


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smoke_of_two_arms_leaves_whole_runs_that_start_from_the_same_step(tmp_path):
    assert main(["smoke", "--arms", "vanilla", "projected", "--out", str(tmp_path / "smoke")]) == 0
    first = {}
    for arm in ("vanilla", "projected"):
        run = tmp_path / "smoke" / "runs" / "smoke" / f"{arm}_s41"
        rows = read_metrics(run / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert set(json.loads((run / "eval.json").read_text())["modes"]) == {"run_tests", "none"}
        first[arm] = rows[0]
    # One seed, one basis: the arms are paired, and only what comes after the first projection differs.
    same = ("reward", "loss", "grad_norm", "cin_s", "cin_t", "cin", "cin_null")
    assert [first["vanilla"][key] for key in same] == [first["projected"][key] for key in same]
    assert first["projected"]["cout"] < 1e-5 < first["vanilla"]["cout"]
