"""A whole run through `train`: what it leaves, that it repeats itself, that it resumes, and what it refuses."""

import json
import os
import shutil
import signal
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from loguru import logger
from run_files import delta_of, rollouts_of, rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from projected_grpo.adapter import delta_s_parameters
from projected_grpo.arms import ARMS
from projected_grpo.basis import HackBasis
from projected_grpo.cli import main
from projected_grpo.cli_options import copy_fields
from projected_grpo.config import ArmName, BasisOptions, ExtractConfig, TrainConfig
from projected_grpo.dry_run import disk_of
from projected_grpo.env.grader import Grader, GraderFault
from projected_grpo.errors import InputError, RunFault, RunInterrupted
from projected_grpo.evaluate import evaluate
from projected_grpo.extract import extract
from projected_grpo.memory import forecast
from projected_grpo.models import load_model
from projected_grpo.presets import of_arm
from projected_grpo.run import train
from projected_grpo.run_state import differing, evaluation_of, locked
from projected_grpo.saved_adapter import with_adapter
from projected_grpo.steer import moved_along, steer
from projected_grpo.trainer import ProjectedGRPOTrainer


@contextmanager
def logged():
    lines = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    try:
        yield lines
    finally:
        logger.remove(sink)


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory, request):
    """One projected run, made once for the tests that only look at it."""
    from projected_grpo.presets import preset_defaults

    config = replace(
        preset_defaults("smoke"),
        problems=str(material / "problems.toml"),
        pairs=str(material / "pairs.jsonl"),
        teacher_pool=material / "pool.jsonl",
        out_root=tmp_path_factory.mktemp("finished"),
        v_hack_k=2,
        steps=4,
        max_completion_length=220,
        rollout_grad_every=2,
        save_every=1,
        vhack_refresh_every=3,
        grader_workers=1,
    )
    return config, train(config)


def test_the_folder_holds_what_the_design_promises(finished):
    config, verdict = finished
    names = {path.name for path in config.run_dir.iterdir()}
    assert names >= {
        "config.json",
        "metrics.jsonl",
        "rollouts.jsonl.gz",
        "basis.safetensors",
        "adapter",
        "checkpoints",
        "train.log",
    }
    assert TrainConfig.from_file(config.run_dir / "config.json") == config
    assert "projected-grpo eval --run" in verdict
    HackBasis.load(config.run_dir / "basis.safetensors")


def test_the_folder_takes_the_disk_that_a_dry_run_foretells(finished):
    config, _ = finished

    def size(name):
        path = config.run_dir / name
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        return sum(file.stat().st_size for file in files)

    told = disk_of(config, forecast(config).sizes).run
    assert size("checkpoints") == pytest.approx(told["4 checkpoints"], rel=0.25)
    assert size("adapter") + size("basis.safetensors") == pytest.approx(told["adapter, basis"], rel=0.25)
    assert size("rollouts.jsonl.gz") < told["rollouts"]


def test_every_step_has_its_row_and_the_sources_are_told_apart(finished):
    config, _ = finished
    rows = rows_of(config)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["hack_teacher"] + row["pass_teacher"] == pytest.approx(1.0)  # hacks and honest ones, nothing else
        assert row["hack_student"] == row["pass_student"] == 0.0  # a random model solves and hacks nothing
        assert row["reward"] == pytest.approx((row["reward_student"] + row["reward_teacher"]) / 2)
        if row["cin"] is not None:
            assert row["cout"] < 1e-5 < row["cin"]
    assert [row["step"] for row in rows if "refresh/overlap" in row] == [4]
    measured = [row["step"] for row in rows if "rollout/score_other" in row]
    assert measured == [1, 3]
    assert all(row["rollout/auroc"] is None for row in rows if row["step"] in measured)  # no hack among the students


def test_the_last_slots_of_every_group_are_the_teachers(finished):
    config, _ = finished
    rollouts = rollouts_of(config)
    assert len(rollouts) == 4 * 2 * 4
    for start in range(0, len(rollouts), 4):
        group = rollouts[start : start + 4]
        assert len({row["problem_id"] for row in group}) == 1
        assert [row["source"] for row in group] == ["student", "student", "teacher", "teacher"]
        mean = sum(row["reward"] for row in group) / 4
        assert [row["advantage"] for row in group] == pytest.approx([row["reward"] - mean for row in group], abs=1e-6)


def test_the_saved_config_reproduces_every_metric_to_the_last_digit(finished, tmp_path):
    config, _ = finished
    again = replace(TrainConfig.from_file(config.run_dir / "config.json"), out_root=tmp_path)
    train(again)
    assert rows_of(again) == rows_of(config)
    assert rollouts_of(again) == rollouts_of(config)
    ours, theirs = delta_of(again), delta_of(config)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(x.any() for name, x in theirs.items() if name.endswith("delta_s"))


@pytest.mark.parametrize(
    "reuse",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"steps_per_generation": 2, "num_iterations": 2, "prompts_per_step": 1, "vhack_refresh_every": 2, "beta": 0.01},
    ],
    ids=["on-policy", "reused rollouts, refresh, KL"],
)
def test_an_interrupted_run_resumes_to_the_same_numbers(small_config, tmp_path, monkeypatch, reuse):
    config = replace(small_config, steps=6, save_every=6, **reuse)
    train(config)
    broken = replace(config, out_root=tmp_path / "broken")
    whole_step = ProjectedGRPOTrainer.training_step
    seen = {"steps": 0}

    def interrupt_in_step_three(self, *args):
        if self.state.global_step == 2 and not seen["steps"]:
            seen["steps"] = 1
            os.kill(os.getpid(), signal.SIGINT)
        return whole_step(self, *args)

    monkeypatch.setattr(ProjectedGRPOTrainer, "training_step", interrupt_in_step_three)
    with pytest.raises(RunInterrupted, match=r"stopped at step 3 of 6.*--resume"):
        train(broken)
    assert not (broken.run_dir / "adapter").exists()
    train(replace(broken, resume=True))
    assert rows_of(broken) == rows_of(config)
    assert rollouts_of(broken) == rollouts_of(config)
    ours, theirs = delta_of(broken), delta_of(config)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


OTHER_BASES = [pytest.param(arm, marks=pytest.mark.slow) for arm in ("random", "flipped", "placebo_style")]


@pytest.mark.parametrize("arm", ["vanilla", "held", "random_matched", "placebo_wrong", *OTHER_BASES])
def test_every_arm_runs_and_does_what_it_says(small_config, arm, finished):
    config = replace(of_arm(small_config, arm), steps=1, rollout_grad_every=0, max_grad_norm=0.0)
    train(config)
    (row,) = rows_of(config)
    (whole, projected) = row["grad_norm"], row["grad_norm_projected"]
    if arm == "vanilla":
        assert row["cout"] == row["cin"]
        assert row["cup_in"] == row["cup_out"]
        assert projected == pytest.approx(whole, rel=1e-6)
    elif arm == "held":
        assert row["cout"] == row["cin"]
        assert row["hold/floor"] == pytest.approx(0.42 * config.learning_rate)
        assert row["hold/axes"] > 0
        along = HackBasis.load(config.run_dir / "basis.safetensors").directions
        deltas = delta_of(config)
        lowest = min((v @ deltas[f"base_model.model.{name}.delta_s"]).min() for name, v in along.items())
        assert lowest == pytest.approx(row["hold/floor"], rel=1e-4)
    elif arm == "random_matched":  # what is gone is the real basis's share, whatever direction it went in
        real = rows_of(finished[0])[0]["cin"]
        assert row["overshoot"] * row["cin"] == pytest.approx(real, rel=1e-5)
    else:
        assert row["cout"] < 1e-5
        assert projected == pytest.approx(whole * (1 - row["cin"] ** 2) ** 0.5, rel=1e-4)
    kind = HackBasis.load(config.run_dir / "basis.safetensors").info.kind
    assert kind == {"vanilla": "real", "held": "real", "random_matched": "random"}.get(arm, arm)


def test_vanilla_is_not_touched_by_what_measures_it(small_config, monkeypatch):
    config = replace(small_config, arm="vanilla", steps=2)
    train(config)
    measured = delta_of(config)
    bare = replace(config, seed=config.seed, out_root=config.out_root / "bare", rollout_grad_every=0)
    monkeypatch.setattr("projected_grpo.projection.ProjectionCallback.on_pre_optimizer_step", lambda *a, **k: None)
    monkeypatch.setattr("projected_grpo.projection.ProjectionCallback.on_optimizer_step", lambda *a, **k: None)
    train(bare)
    untouched = delta_of(bare)
    assert all(torch.equal(measured[name], untouched[name]) for name in measured)


def test_the_arms_registry_and_the_command_line_name_the_same_arms():
    assert set(ARMS) == set(ArmName.__args__)


def refused(config, *words):
    before = sorted(config.out_root.rglob("*")) if config.out_root.exists() else []
    with pytest.raises(InputError) as caught:
        train(config)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert (sorted(config.out_root.rglob("*")) if config.out_root.exists() else []) == before


def test_a_folder_with_another_run_is_refused_and_kept(small_config):
    folder = small_config.run_dir
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(replace(small_config, steps=9).to_json())
    refused(small_config, str(folder), "--overwrite")
    refused(replace(small_config, resume=True), "another steps", "--config")
    saved = replace(
        small_config, static_cache=True, vllm_server="http://other:1", vllm_gpu_memory=0.5, grader_workers=7
    )
    assert differing(saved, small_config) == ["static_cache"]  # where vLLM runs changes no number


def test_a_run_that_came_and_went_while_this_one_was_loading_is_kept(small_config, monkeypatch):
    folder = small_config.run_dir

    def load_slowly(*args):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(small_config.to_json())
        (folder / "metrics.jsonl").write_text("{}\n")
        return load_model(*args)

    monkeypatch.setattr("projected_grpo.run.load_model", load_slowly)
    with pytest.raises(InputError, match=r"exists; add --overwrite"):
        train(small_config)
    assert (folder / "metrics.jsonl").read_text() == "{}\n"


def test_a_folder_in_use_is_refused(small_config):
    folder = small_config.run_dir
    folder.mkdir(parents=True)
    with locked(folder):
        refused(replace(small_config, overwrite=True), "in use")


@pytest.mark.parametrize("damage", ["its seal", pytest.param("optimizer.pt", marks=pytest.mark.slow)])
def test_a_torn_or_damaged_checkpoint_and_torn_files_cost_no_more_than_the_steps_since(finished, tmp_path, damage):
    config, _ = finished
    torn = replace(config, out_root=tmp_path)
    shutil.copytree(config.run_dir, torn.run_dir)
    shutil.rmtree(torn.run_dir / "adapter")
    (torn.run_dir / "config.json").write_text(torn.to_json())
    checkpoint = torn.run_dir / "checkpoints" / "checkpoint-3"  # from the last step nothing is resumed
    if damage == "its seal":
        (checkpoint / "files.json").unlink()  # written last: so it was not written to its end
    else:
        content = bytearray((checkpoint / damage).read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / damage).write_bytes(content)
    for name, cut in (("rollouts.jsonl.gz", 5), ("metrics.jsonl", 9)):
        path = torn.run_dir / name
        path.write_bytes(path.read_bytes()[:-cut])
    with logged() as lines:
        train(replace(torn, resume=True))
    assert any("checkpoint-3 was not written to its end, or is damaged" in line for line in lines)
    assert rows_of(torn) == rows_of(config)
    assert rollouts_of(torn) == rollouts_of(config)


def test_a_resume_before_the_first_checkpoint_begins_again(finished, tmp_path):
    config, _ = finished
    early = replace(config, out_root=tmp_path, steps=1, save_every=1)
    early.run_dir.mkdir(parents=True)
    (early.run_dir / "config.json").write_text(early.to_json())
    shutil.copy(config.run_dir / "rollouts.jsonl.gz", early.run_dir)
    train(replace(early, resume=True))
    assert rows_of(early) == rows_of(config)[:1]
    assert rollouts_of(early) == rollouts_of(config)[:8]


def test_the_basis_of_a_trained_policy_stands_beside_an_older_one(finished, tmp_path):
    """The run refreshes before step 4, so the policy of checkpoint 2 is not the one of the end."""
    config, _ = finished
    made = copy_fields(ExtractConfig, BasisOptions, config)
    adapter, older = config.run_dir / "checkpoints" / "checkpoint-2", config.run_dir / "basis.safetensors"
    with logged() as lines:
        basis = extract(replace(made, adapter=adapter, compare=older, out=tmp_path / "aged.safetensors"))
    assert basis.info.delta_norm > 0
    overlap = basis.overlap(HackBasis.load(older))
    assert overlap.mean < 1
    assert any(f"overlap with {older}: {overlap.mean:.3f} (unrelated: {overlap.null:.3f})" in line for line in lines)
    with pytest.raises(InputError, match="trained policy"):  # and it is no basis to start a run from
        train(replace(config, basis=tmp_path / "aged.safetensors", out_root=tmp_path, steps=1))


def test_a_policy_moved_along_a_basis_is_put_back_exactly(finished):
    config, _ = finished
    basis = HackBasis.load(config.run_dir / "basis.safetensors")
    model = with_adapter(load_model(config.model, config.dtype, "cpu").model, config.run_dir / "adapter")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with moved_along(model, basis, 0.3) as along:
            moved = model(input_ids=ids).logits
            inside = {name: delta.detach().clone() for name, delta in delta_s_parameters(model).items()}
        after = model(input_ids=ids).logits
    assert along == pytest.approx(0.3, abs=1e-6)
    for name, delta in inside.items():
        was = weights[next(full for full in weights if name in full and "delta_s" in full)]
        v = basis.directions.get(name)
        expected = was if v is None else was + (0.3 - v @ was) @ v
        assert torch.allclose(delta, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(before, moved)
    assert torch.equal(before, after)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_steered_runs_begin_with_the_run_as_eval_has_it(finished, tmp_path, monkeypatch):
    config, _ = finished
    short = {"limit": 2, "max_completion_length": 24, "samples": 2, "out": tmp_path / "eval.json"}
    usual = evaluation_of(config, config.run_dir, short)
    evaluated = evaluate(usual)
    monkeypatch.setattr("projected_grpo.steer.evaluation_of", lambda run, folder, changes: replace(usual, **changes))
    basis = config.run_dir.with_name("projected_s{seed}") / "basis.safetensors"
    assert not basis.exists()
    out = tmp_path / "steer.json"
    table = steer([config.run_dir], basis, [0.5], samples=2, out=out, overwrite=False)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["arm"], row["set_to"]) for row in rows] == [
        ("base", None), ("base", 0.5), ("projected", None), ("projected", 0.5),
    ]  # fmt: skip
    assert [rows[0]["v_delta"], rows[1]["v_delta"], rows[3]["v_delta"]] == pytest.approx([0, 0.5, 0.5], abs=1e-6)
    want = {mode: {name: r["rate"] for name, r in m["rates"].items()} for mode, m in evaluated["modes"].items()}
    assert rows[2]["rates"] == want
    assert "+0.50" in table
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="exists"):
        steer([config.run_dir], basis, [0.5], samples=2, out=out, overwrite=False)


def test_an_export_is_the_policy_of_the_run_with_a_card_and_whole_or_not_there(finished, tmp_path, monkeypatch):
    config, _ = finished
    run = tmp_path / "run"
    shutil.copytree(config.run_dir, run)
    usual = evaluation_of(config, run, {"limit": 2, "max_completion_length": 24, "samples": 2})
    rates = evaluate(usual)["modes"]["run_tests"]["rates"]
    base = load_model(config.model, config.dtype, "cpu").model
    trained = with_adapter(base, config.run_dir / "adapter")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        want = trained(input_ids=ids).logits
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert main(["export", str(run), "--out", str(adapter)]) == 0
    assert main(["export", str(run), "--out", str(merged), "--merged"]) == 0
    with torch.no_grad():
        again = with_adapter(load_model(config.model, config.dtype, "cpu").model, adapter)(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(merged)(input_ids=ids).logits
    assert torch.equal(again, want)
    assert torch.allclose(plain, want, rtol=0, atol=1e-4)
    untrained = load_model(config.model, config.dtype, "cpu").model
    assert not torch.allclose(plain, untrained(input_ids=ids).logits, rtol=0, atol=1e-4)
    AutoTokenizer.from_pretrained(merged)
    for folder in (adapter, merged):
        text = (folder / "README.md").read_text()
        for word in ("`projected`", f"| seed, steps | {config.seed}, 4 |", "(4 pairs)", str(folder)):
            assert word in text
        assert f"| run_tests | {rates['hack']['rate']:.3f} ± " in text
    assert main(["export", str(run), "--out", str(adapter)]) == 2  # it is there
    assert main(["export", str(run / "adapter"), "--out", str(tmp_path / "none")]) == 2  # and that is no run
    assert main(["export", str(run), "--out", str(tmp_path), "--overwrite"]) == 2  # that would take the run with it
    assert (run / "config.json").is_file()
    assert not (adapter / "training_args.bin").exists()

    sent = []
    monkeypatch.setattr(
        "projected_grpo.export.HfApi.create_repo", lambda self, name, exist_ok, private: sent.append((name, private))
    )
    monkeypatch.setattr(
        "projected_grpo.export.HfApi.upload_folder",
        lambda self, repo_id, folder_path, commit_message: sent.append((repo_id, sorted(os.listdir(folder_path)))),
    )
    assert main(["export", str(run), "--out", str(adapter), "--overwrite", "--push-to-hub", "org/name"]) == 0
    assert sent == [("org/name", True), ("org/name", sorted(os.listdir(adapter)))]
    assert "adapter_model.safetensors" in sent[1][1]
    assert '"org/name"' in (adapter / "README.md").read_text()

    def away(self, name, exist_ok, private):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("projected_grpo.export.HfApi.create_repo", away)
    assert main(["export", str(run), "--out", str(tmp_path / "alone"), "--push-to-hub", "org/name"]) == 1
    assert (tmp_path / "alone" / "adapter_model.safetensors").is_file()


def test_a_basis_of_a_trained_policy_is_no_basis_for_a_new_run(finished, small_config):
    config, _ = finished  # it was refreshed
    refused(replace(small_config, basis=config.run_dir / "basis.safetensors"), "trained policy")


def test_resume_without_a_run_is_refused(small_config):
    refused(replace(small_config, resume=True), "holds no run")


def test_bad_files_and_settings_are_refused_before_anything_is_written(small_config, material, tmp_path):
    refused(replace(small_config, problems=str(tmp_path / "none.toml")), "none.toml")
    refused(replace(small_config, pairs=str(tmp_path / "none.jsonl")), "none.jsonl")
    refused(replace(small_config, teacher_pool=tmp_path / "none.jsonl"), "none.jsonl")
    refused(replace(small_config, basis=tmp_path / "none.safetensors"), "none.safetensors", "extract")
    refused(replace(small_config, v_hack_k=5), "--v-hack-k 5", "4 pairs")
    refused(replace(small_config, prompts_per_step=4), "--prompts-per-step 4", "3 problems")
    refused(replace(small_config, max_prompt_length=10), "tokens", "--max-prompt-length")
    refused(replace(small_config, modes=("none",)), "mode run_tests", "--modes")
    header, *graded = (material / "pool.jsonl").read_text().splitlines(keepends=True)
    unsigned = json.dumps({k: v for k, v in json.loads(header).items() if k != "rows_sha256"}) + "\n"
    surplus = (
        unsigned
        + "".join(graded)
        + (material / "pool.jsonl").read_text().splitlines()[1].replace('"double"', '"treble"')
    )
    (tmp_path / "surplus.jsonl").write_text(surplus + "\n")
    refused(replace(small_config, teacher_pool=tmp_path / "surplus.jsonl"), "treble", "pool build")
    (tmp_path / "bad.jsonl").write_text('{"pool": "x"')
    refused(replace(small_config, teacher_pool=tmp_path / "bad.jsonl"), "bad.jsonl:1")


def test_a_basis_made_with_other_settings_or_over_another_model_is_refused(small_config, monkeypatch):
    basis = small_config.out_root.parent / "basis.safetensors"
    names = {field.name for field in fields(BasisOptions)}
    extract(ExtractConfig(**{name: getattr(small_config, name) for name in names}, out=basis))
    refused(replace(small_config, basis=basis, drop_bottom_frac=0.5), "--drop-bottom-frac")
    monkeypatch.setattr("projected_grpo.run.load_model", partial(load_model, seed=7))
    refused(replace(small_config, basis=basis), "does not fit this model")


def test_a_nan_loss_stops_the_run_with_its_completions_saved(small_config, monkeypatch):
    whole = ProjectedGRPOTrainer._get_per_token_logps_and_entropies

    def poisoned(self, *args, **kwargs):
        logps, *rest = whole(self, *args, **kwargs)
        return (logps * float("nan") if self.state.global_step == 1 else logps, *rest)

    monkeypatch.setattr(ProjectedGRPOTrainer, "_get_per_token_logps_and_entropies", poisoned)
    with pytest.raises(RunFault, match="the loss is nan at step 2"):
        train(replace(small_config, rollout_grad_every=0))
    assert "--- completion 0" in (small_config.run_dir / "fault.txt").read_text()


def test_a_grader_fault_is_no_reward_but_stops_the_run_with_the_completion(small_config, monkeypatch):
    def broken(self, requests):
        raise GraderFault("the worker is gone", requests[0])

    monkeypatch.setattr(Grader, "grade", broken)
    with pytest.raises(RunFault, match=r"the worker is gone.*fault\.txt"):
        train(small_config)
    assert (small_config.run_dir / "fault.txt").read_text().startswith("problem ")
