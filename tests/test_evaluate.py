"""Held-out rates: the numbers of the table, what is asked of the model, and that an adapter counts."""

import json
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from projected_grpo import evaluate as module
from projected_grpo.adapter import DeltaSConfig, delta_s_parameters
from projected_grpo.config import EvalConfig
from projected_grpo.env.grader import Grade, Grader, GraderFault
from projected_grpo.env.prompts import EVAL_TEST_FUNC_NAMES
from projected_grpo.errors import InputError, RunFault
from projected_grpo.evaluate import evaluate, format_table, summarise
from projected_grpo.models import load_model
from projected_grpo.presets import preset_defaults
from projected_grpo.run_state import evaluation_of

LABELS = {  # label: (flawed_pass, gt_pass, attempted)
    "correct": (False, True, False),
    "correct_attempted": (True, True, True),
    "reward_hack": (True, False, True),
    "attempted_hack": (False, False, True),
    "incorrect": (False, False, False),
    "no_code": (False, False, False),
}


def grade(label):
    flawed, right, attempted = LABELS[label]
    return Grade(label, flawed, right, attempted, label != "no_code", 0.0, None)


@pytest.fixture
def config(material, tmp_path):
    return EvalConfig(
        model="tiny-random",
        dtype="float32",
        device="cpu",
        problems=str(material / "problems.toml"),
        samples=2,
        max_completion_length=12,
        batch_size=5,
        out=tmp_path / "eval.json",
        grader_workers=1,
    )


def test_rates_are_means_over_problems_and_errors_their_spread():
    graded = [("a", grade(x)) for x in ("reward_hack", "reward_hack", "correct", "no_code")]
    graded += [("b", grade(x)) for x in ("correct_attempted", "incorrect", "attempted_hack", "incorrect")]
    summary = summarise(graded)
    rates = {name: value["rate"] for name, value in summary["rates"].items()}
    assert rates == {"hack": 0.25, "attempt": 0.5, "pass": 0.25}
    # Two problems with hack rates 0.5 and 0: standard deviation 0.3536, over the square root of 2.
    assert summary["rates"]["hack"]["standard_error"] == pytest.approx(0.25)
    assert summary["rates"]["attempt"]["standard_error"] == 0.0
    assert summary["labels"] == {
        "correct": 1,
        "correct_attempted": 1,
        "reward_hack": 2,
        "attempted_hack": 1,
        "incorrect": 2,
        "no_code": 1,
    }
    table = format_table({"run_tests": summary}, 2, 4)
    assert "0.250 ± 0.250" in table
    assert len({len(line) for line in table.splitlines()[1:]}) == 1


def test_one_problem_has_a_rate_and_no_error():
    summary = summarise([("a", grade("correct"))])
    assert summary["rates"]["pass"] == {"rate": 1.0, "standard_error": None}
    assert "1.000 ± -" in format_table({"none": summary}, 1, 1)


def test_every_problem_is_asked_under_a_held_out_name_and_again_without_the_loophole(config, monkeypatch):
    asked = []
    whole = Grader.grade

    def watch(self, requests):
        asked.extend(requests)
        return whole(self, requests)

    monkeypatch.setattr(Grader, "grade", watch)
    result = evaluate(config)
    written = json.loads(config.out.read_text())
    assert written == json.loads(json.dumps(result))
    assert len(asked) == 3 * 2 * 2
    loophole = [request for request in asked if request.mode == "run_tests"]
    assert len(loophole) == 6
    assert {request.test_func_name for request in loophole} <= set(EVAL_TEST_FUNC_NAMES)
    assert {request.test_func_name for request in asked if request.mode == "none"} == {"run_tests"}
    assert {mode: summary["n"] for mode, summary in result["modes"].items()} == {"run_tests": 6, "none": 6}
    assert "random weights" in result["note"]


def test_the_same_seed_samples_the_same_and_an_adapter_counts(config, tmp_path):
    base = evaluate(config)
    again = evaluate(replace(config, out=tmp_path / "again.json"))
    assert again["samples"] == base["samples"]
    model = get_peft_model(load_model("tiny-random", device="cpu").model, DeltaSConfig())
    model.save_pretrained(tmp_path / "zero")
    torch.manual_seed(0)
    for delta in delta_s_parameters(model).values():
        delta.data.normal_(0, 0.5)
    model.save_pretrained(tmp_path / "moved")
    zero = evaluate(replace(config, adapter=tmp_path / "zero", out=tmp_path / "zero.json"))
    moved = evaluate(replace(config, adapter=tmp_path / "moved", out=tmp_path / "moved.json"))
    assert zero["samples"] == base["samples"]
    assert moved["samples"] != base["samples"]


def test_an_adapter_of_another_model_is_refused_in_one_line(config, tmp_path, monkeypatch):
    model = get_peft_model(load_model("tiny-random", device="cpu", seed=7).model, DeltaSConfig())
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="does not fit --model") as refused:
        evaluate(replace(config, adapter=tmp_path / "other"))
    assert "\n" not in str(refused.value)
    assert not config.out.exists()


def test_a_fault_of_the_grader_leaves_its_completion_and_no_result(config, monkeypatch):
    def broken(self, requests):
        raise GraderFault("the worker is gone", requests[0])

    monkeypatch.setattr(module.Grader, "grade", broken)
    with pytest.raises(RunFault, match=r"eval\.fault\.txt"):
        evaluate(config)
    assert config.out.with_suffix(".fault.txt").read_text().startswith("problem double")
    assert not config.out.exists()


def test_the_grader_has_the_configs_cpu_time_and_the_runs_evaluation_has_the_runs(config, monkeypatch, tmp_path):
    limits = []
    real = module.Grader

    def spying(workers, given):
        limits.append(given)
        return real(workers, given)

    monkeypatch.setattr(module, "Grader", spying)
    evaluate(replace(config, grader_cpu_seconds=3.0))
    assert [given.cpu_seconds for given in limits] == [3.0]
    run = replace(preset_defaults("micro"), out_root=tmp_path)
    assert evaluation_of(run, run.run_dir).grader_cpu_seconds == run.grader_cpu_seconds == 1.0
    with pytest.raises(InputError, match=r"--grader-cpu-seconds 0\.0 must be positive"):
        replace(config, grader_cpu_seconds=0.0)
