"""The benchmarks: that they measure what they say, in turn, and report it. Nothing here is about speed itself."""

import json
import re
import time
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from projected_grpo.adapter import DeltaSConfig, delta_s_parameters
from projected_grpo.bench.extraction import BATCHED, LOOP_MERGED, LOOP_PLAIN, _bases_apart, bench_extract, by_loop
from projected_grpo.bench.generation import GROWING, STATIC
from projected_grpo.bench.layer import BOTH, DEFERRED, FROZEN, LORA, MERGED, PLAIN, SPLIT
from projected_grpo.bench.step import OURS, PROJECTED, STOCK, _Turns, bench_step
from projected_grpo.bench.timing import Timings, in_turn, quartiles
from projected_grpo.cli import main
from projected_grpo.config import BasisOptions
from projected_grpo.models import load_model
from projected_grpo.pair_gradients import EncodedPair, pair_gradients
from projected_grpo.presets import preset_defaults
from projected_grpo.trainer import ProjectedGRPOTrainer

WIDE = {("ours", "peer"): 2.0}
PAIRS = [EncodedPair(list(range(5, 20 + i)), list(range(40, 52)), list(range(60, 66 + i))) for i in range(3)]


def test_cases_are_run_in_turn_and_the_warm_up_is_not_counted():
    order = []
    cases = {name: (lambda name=name: order.append(name)) for name in "ab"}
    seconds = in_turn(cases, 3, torch.device("cpu"), warm_up=2)
    assert "".join(order) == "ab" * 5
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    slow = in_turn({"slow": lambda: time.sleep(0.01), "fast": lambda: None}, 1, torch.device("cpu"))
    assert slow["slow"][0] > 0.009 > slow["fast"][0]


def test_ratios_are_those_within_a_round_and_the_table_says_what_holds(tmp_path):
    seconds = {"peer": [1.0, 10.0, 2.0], "ours": [1.5, 15.0, 4.0]}
    timings = Timings("a thing", seconds, {"rows": 3}, {("ours", "peer"): 1.6, ("peer", "ours"): 0.5}, ("a note",))
    assert timings.ratios("ours", "peer") == [1.5, 1.5, 2.0]
    table = timings.table()
    assert "ours / peer: 1.50 (1.50 - 1.75; to hold: at most 1.6): held, not resolved" in table
    assert "peer / ours: 0.67 (0.58 - 0.67; to hold: at most 0.5): NOT HELD\n" in table
    assert "ours / peer: 1.50 (1.50 - 1.75; to hold: at most 2): held\n" in replace(timings, limits=WIDE).table()
    assert "at most 1.49): NOT HELD\n" in replace(timings, limits={("ours", "peer"): 1.49}).table()
    assert table.splitlines()[0] == "a thing"
    assert table.splitlines()[-1] == "  a note"
    timings.save(tmp_path / "deep" / "t.json")
    saved = json.loads((tmp_path / "deep" / "t.json").read_text())
    assert saved["seconds"] == seconds
    assert saved["limits"][0] == {"case": "ours", "to": "peer", "at_most": 1.6}
    assert quartiles([2.0]) == (2.0, 2.0, 2.0)
    assert quartiles([1.0, 2.0, 3.0]) == (1.5, 2.0, 2.5)


def test_bench_layer_times_every_form_of_a_layer(tmp_path, capsys):
    out = tmp_path / "layer.json"
    small = ["--d-out", "12", "--d-in", "8", "--tokens", "24", "--rows", "4", "--rounds", "2", "--device", "cpu"]
    assert main(["bench", "layer", *small, "--out", str(out)]) == 0
    seconds = json.loads(out.read_text())["seconds"]
    assert list(seconds) == [FROZEN, LORA, PLAIN, MERGED, SPLIT, DEFERRED, BOTH]
    assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())
    assert "12 x 8, micro-batches 4, tokens each 24, rows 4" in capsys.readouterr().out


def test_bench_svd_shows_the_errors_of_both_routes(tmp_path, capsys):
    small = ["--d-out", "12", "--d-in", "8", "--rounds", "1", "--device", "cpu", "--out", str(tmp_path / "svd.json")]
    assert main(["bench", "svd", *small]) == 0
    out = capsys.readouterr().out
    assert out.count("max-norm errors: W ") == 3


def test_the_loop_that_the_batches_are_timed_against_gives_the_same_gradients():
    model = get_peft_model(load_model("tiny-random", "float64", "cpu").model, DeltaSConfig())
    with torch.no_grad():
        for delta in delta_s_parameters(model).values():
            delta += 0.01
    ours, slow = pair_gradients(model, PAIRS, temperature=0.7), by_loop(model, PAIRS, 0.7)
    for name, rows in slow.items():
        assert (ours[name] - rows).norm() <= 1e-6 * rows.norm()
    options = BasisOptions(temperature=0.7, v_hack_k=2)
    timings = bench_extract(model, PAIRS, options, 1, {"model": "tiny"})
    assert list(timings.seconds) == [LOOP_PLAIN, LOOP_MERGED, BATCHED]
    assert timings.about["pairs"] == 3
    gradients, bases = timings.notes
    assert float(gradients.split("plain loop's: ")[1].split()[0]) < 1e-6
    assert float(bases.split("at most ")[1].split()[0]) < 1e-6
    same, modules = map(int, bases.split("the same k in ")[1].split(" modules")[0].split(" of "))
    assert 0 < same == modules
    other = {name: rows.roll(1, dims=1) for name, rows in slow.items()}
    apart = _bases_apart(model, other, slow, options)
    assert float(apart.split("at most ")[1].split()[0]) > 0.5


def test_one_of_several_threads_runs_at_a_time_and_one_that_fails_ends_all():
    order, turns = [], _Turns(["a", "b"])

    def work(name, steps, fails=False):
        def run():
            for i in range(steps):
                if i:
                    turns.pass_on()
                    turns.wait(name)
                order.append(name)
                time.sleep(0.002)
            if fails:
                raise RuntimeError("no more")

        return run

    turns.run({"a": work("a", 3), "b": work("b", 4)})
    assert "".join(order) == "abababb"
    turns = _Turns(["a", "b"])
    with pytest.raises(RuntimeError, match="no more"):
        turns.run({"a": work("a", 1, fails=True), "b": work("b", 9)})


@pytest.mark.slow
def test_a_step_of_ours_is_timed_beside_one_of_stock_trl(monkeypatch):
    config = replace(preset_defaults("smoke"), n_pairs=4, max_completion_length=4, prompts_per_step=1)
    teachers, refreshed = [], []
    loss, metrics = ProjectedGRPOTrainer._compute_loss, ProjectedGRPOTrainer._source_metrics

    def watched_loss(self, model, inputs):
        teachers.append(inputs["is_teacher"].tolist())
        return loss(self, model, inputs)

    def watched_metrics(self):
        refreshed.append("refresh/overlap" in self.projection.metrics)
        return metrics(self)

    monkeypatch.setattr(ProjectedGRPOTrainer, "_compute_loss", watched_loss)
    monkeypatch.setattr(ProjectedGRPOTrainer, "_source_metrics", watched_metrics)
    timings = bench_step(config, rounds=1)
    assert [(len(rows), sum(rows)) for rows in teachers] == [(4, 2)] * 2 * len(OURS)
    assert refreshed == [False] * len(OURS) + [False, False, True, False]  # in turn; the first step has its basis
    assert list(timings.seconds) == [STOCK, *OURS]
    assert all(len(times) == 1 and times[0] > 0 for times in timings.seconds.values())
    assert timings.about["rows"] == 4
    assert timings.about["pairs"] == 4
    *generation, projection = timings.notes
    assert all("generation" in note and "generation 0 ms" not in note for note in generation)
    share = re.search(r"take \d+\.\d ms, (\d+\.\d\d)% of a step", projection)
    assert 0 < float(share[1]) < 100
    assert (PROJECTED, STOCK) in timings.limits


def test_bench_generation_samples_a_steps_rows_both_ways(tmp_path, capsys):
    out = tmp_path / "generation.json"
    small = ["smoke", "--rounds", "2", "--max-completion-length", "5", "--out", str(out)]
    assert main(["bench", "generation", *small]) == 0
    said = json.loads(out.read_text())
    assert list(said["seconds"]) == [GROWING, STATIC]
    assert all(len(times) == 2 and min(times) > 0 for times in said["seconds"].values())
    assert (said["about"]["rows"], said["about"]["tokens"]) == (4, 5)  # two prompts, half of each group of four
    assert "compiles nothing on this device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["layer", "--rounds", "0"], "--rounds 0 must be at least 1"),
        (["layer", "--tokens", "10", "--rows", "4"], "--tokens 10 is no multiple of --rows 4"),
        (["layer", "--d-out", "0"], "--d-out 0 must be at least 1"),
        (["layer", "--device", "tpu9"], "no device"),
        (["svd", "--d-in", "-1"], "--d-in -1 must be at least 1"),
        (["step", "smoke", "--rounds", "none"], "--rounds none must be a number"),
        (["step", "smoke", "--rounds", "²"], "must be a number"),
        (["step", "tiny"], "tiny"),
        (["generation", "smoke", "--static-cache"], "--static-cache is set by bench generation itself"),
        (["extract", "smoke", "--token-reduction", "mean"], "leave --token-reduction out"),
        (["step", "smoke", "--arm", "vanilla"], "--arm is set by bench step itself"),
        (["step", "smoke", "--mix-ratio", "0.5", "--teacher-pool", "x"], "--mix-ratio is set by bench step itself"),
        (["step", "smoke", "--prompts-per-step", "999"], "exceeds the 60 problems"),
        (["layer", "--device", "meta"], "--device 'meta' holds no numbers"),
        (["layer", "--out", "."], "--out . is a folder"),
        (["svd", "--out", "pyproject.toml"], "--out pyproject.toml exists"),
        (["extract", "smoke", "--out", "pyproject.toml"], "--out pyproject.toml exists"),
        (["extract", "smoke", "--rounds", "0"], "--rounds 0 must be a number of at least 1"),
        (["extract", "smoke", "--pairs", "absent.toml"], "absent.toml: no such file"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(capsys, args, says):
    assert main(["bench", *args]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    assert says in error
