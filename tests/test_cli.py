"""The command line itself: help at once, errors in one line with exit code 2, presets that are nothing but defaults."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from projected_grpo import cli
from projected_grpo.cli import COMMANDS, main
from projected_grpo.config import EvalConfig, ExtractConfig, TrainConfig
from projected_grpo.errors import InputError, RunFault, RunInterrupted
from projected_grpo.presets import PRESETS, preset_defaults


def refused(capsys, args, *words):
    assert main(args) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    for word in words:
        assert word in error
    return error


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trane"], ["unknown command 'trane'", "train"]),
        (["pairs"], ["unknown command 'pairs'", "pairs check"]),
        (["train", "smoke", "--arm", "foo"], ["'foo'", "--arm", "vanilla"]),
        (["train", "smoke", "--gate", "both"], ["'both'", "--gate", "one_sided"]),
        (["train", "smoke", "--arms", "projected"], ["--arms"]),
        (["train", "smoke", "--steps", "many"], ["--steps", "many"]),
        (["train", "tiny"], ["tiny"]),
        (["train", "smoke", "--mix-ratio", "1"], ["--mix-ratio 1.0", "[0, 1)"]),
        (["train", "smoke", "--mix-ratio", "0.3"], ["--mix-ratio 0.3", "whole number"]),
        (["train", "smoke", "--teacher-pool", "None"], ["--mix-ratio 0.5 needs --teacher-pool", "pool build"]),
        (["train", "smoke", "--micro-batch", "3"], ["--micro-batch 3", "divisor"]),
        (["train", "smoke", "--v-hack-k", "0"], ["--v-hack-k 0"]),
        (["train", "smoke", "--drop-bottom-frac", "1"], ["--drop-bottom-frac 1.0"]),
        (["train", "smoke", "--group-size", "1", "--micro-batch", "1"], ["--group-size 1"]),
        (["train", "smoke", "--arm", "random", "--vhack-refresh-every", "2"], ["--vhack-refresh-every", "random"]),
        (["train", "smoke", "--micro-batch", "0"], ["--micro-batch 0 must be at least 1"]),
        (["train", "smoke", "--rollout-grad-every", "-1"], ["--rollout-grad-every -1"]),
        (["train", "smoke", "--learning-rate", "0"], ["--learning-rate 0.0 must be positive"]),
        (["train", "smoke", "--top-p", "0"], ["--top-p 0.0"]),
        (["train", "smoke", "--seed", "-1"], ["--seed -1"]),
        (["train", "smoke", "--hold-rate", "1"], ["--hold-rate 1.0 needs --project-target displacement"]),
        (["train", "smoke", "--project-target", "displacement", "--gate", "reverse"], ["displacement", "reverse"]),
        (["train", "smoke", "--project-target", "displacement", "--hold-cap", "1"], ["--hold-cap 1.0 needs"]),
        (["train", "smoke", "--project-target", "displacement", "--vhack-refresh-every", "2"], ["new basis", "jump"]),
        (["train", "smoke", "--arm", "random_matched", "--project-target", "displacement"], ["random_matched"]),
        (["train", "micro", "--project-rows", "student"], ["--project-rows student needs", "--mix-ratio"]),
        (["train", "micro", "--pairs-by-seed"], ["--pairs-by-seed needs --n-pairs"]),
        (["steer", "--basis", "b"], ["steer needs RUNS"]),
        (["train", "smoke", "--update-metric", "adam"], ["--update-metric adam needs --project-target update"]),
        (
            ["train", "smoke", "--project-rows", "student", "--project-target", "both"],
            ["--project-rows student needs --project-target grad"],
        ),
        (["extract", "smoke", "--device", "bogus", "--out", "out/none/x"], ["--device 'bogus'", "use cpu"]),
        (["eval", "smoke", "--adapter", "nowhere"], ["nowhere", "adapter_config.json"]),
        (["eval", "smoke", "--top-p", "0"], ["--top-p 0.0"]),
        (["train", "--config", "none.json"], ["none.json", "does not exist"]),
        (["train", "--config"], ["--config needs a value"]),
        (["eval", "--run", "nowhere"], ["nowhere", "does not exist"]),
        (["extract", "smoke", "--control", "random"], ["--control and --like go together"]),
        (["smoke", "--preset", "tiny"], ["preset 'tiny' is unknown", "smoke-real"]),
        (["grade", "--problems", "a", "--completions", "b"], ["--out"]),
    ],
)
def test_a_bad_argument_is_one_line_that_names_it_and_exit_code_two(capsys, args, words):
    refused(capsys, args, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["config.json:1", "JSON"]),
        ("[]", ["no JSON object"]),
        ('{"stepz": 3}', ["unknown key 'stepz'"]),
        ('{"mix_ratio": 0.5}', ["--mix-ratio 0.5 needs --teacher-pool"]),
        ('{"arm": "foo"}', ["config.json: arm 'foo'", "vanilla"]),
        ('{"steps": "10"}', ["steps '10'", "int"]),
        ('{"steps": true}', ["steps True"]),
        ('{"basis": 3}', ["basis 3"]),
        ('{"steps": 0}', ["--steps 0 must be at least 1"]),
    ],
)
def test_a_bad_config_file_is_refused(capsys, tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    refused(capsys, ["train", "--config", str(tmp_path / "config.json")], *words)


def test_an_output_that_cannot_be_written_is_refused_before_any_work(capsys, tmp_path):
    (tmp_path / "file").write_text("precious")
    for command in (["extract", "smoke"], ["pool", "build"], ["eval", "smoke"]):
        refused(capsys, [*command, "--out", str(tmp_path / "file" / "x")], "cannot be written")
        refused(capsys, [*command, "--out", str(tmp_path / "file")], "exists", "--overwrite")
        refused(capsys, [*command, "--out", str(tmp_path), "--overwrite"], "is a folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "precious"


def test_a_damaged_adapter_is_refused_in_one_line(capsys, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    args = ["eval", "smoke", "--adapter", str(folder), "--out", str(tmp_path / "eval.json")]
    refused(capsys, args, "holds no adapter_model.safetensors")
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    refused(capsys, args, "is damaged")


def test_a_policy_is_not_evaluated_on_what_it_trained_on(capsys, tmp_path):
    args = ["eval", "smoke", "--problems", "train", "--trained-on", "train", "--out", str(tmp_path / "eval.json")]
    refused(capsys, args, "was trained on", "60 such")


def test_the_help_of_everything_ends_well(capsys):
    assert main(["--help"]) == 0
    listing = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in listing
        with pytest.raises(SystemExit) as ended:
            main([*name.split(), "--help"])
        assert ended.value.code == 0


def test_help_and_argument_errors_load_nothing_heavy():
    code = (
        "import sys\nfrom projected_grpo.cli import main\n"
        "main(['--help']); main(['train', 'smoke', '--arm', 'foo']); main(['train', '--config', 'none'])\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'peft', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_dash_m_is_the_same_command_line():
    done = subprocess.run([sys.executable, "-m", "projected_grpo", "trane"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown command 'trane'")


def test_a_preset_named_alone_is_the_published_setting_and_full_is_the_default(monkeypatch):
    seen = []
    monkeypatch.setattr("projected_grpo.run.train", seen.append)
    assert (
        main(["train", "full"]) == main(["train", "--arm", "vanilla"]) == main(["train", "fast", "--steps", "3"]) == 0
    )
    full, vanilla, fast = seen
    assert (full.model, full.steps, full.prompts_per_step, full.group_size) == ("Qwen/Qwen3-4B", 200, 43, 6)
    assert (full.max_completion_length, full.beta, full.learning_rate) == (1024, 1e-3, 3e-3)
    assert (full.adam_beta1, full.adam_beta2, full.mix_ratio, full.gate) == (0.5, 0.9, 0.5, "one_sided")
    assert vanilla == replace(full, arm="vanilla")
    assert fast == replace(preset_defaults("fast"), steps=3)
    assert (fast.prompts_per_step, fast.group_size, fast.num_teacher, fast.beta) == (4, 8, 4, 0.0)


def test_a_config_survives_its_file_for_every_preset(tmp_path):
    for _, config in PRESETS.values():
        path = tmp_path / "config.json"
        path.write_text(config.to_json())
        assert TrainConfig.from_file(path) == config


def test_extract_and_eval_take_the_presets_own_settings(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("projected_grpo.extract.extract", seen.append)
    monkeypatch.setattr("projected_grpo.evaluate.evaluate", seen.append)
    assert main(["extract", "smoke", "--out", "x"]) == 0
    run = replace(preset_defaults("smoke"), temperature=0.9, problems="train")
    (tmp_path / "config.json").write_text(run.to_json())
    assert main(["eval", "--run", str(tmp_path), "--samples", "3"]) == 0
    extracted, evaluated = seen
    assert isinstance(extracted, ExtractConfig)
    assert (extracted.model, extracted.v_hack_k) == ("tiny-random", 4)
    assert isinstance(evaluated, EvalConfig)
    assert (evaluated.model, evaluated.temperature, evaluated.samples) == ("tiny-random", 0.9, 3)
    assert evaluated.problems == "eval"  # never those that it was trained on
    assert (evaluated.adapter, evaluated.out) == (tmp_path / "adapter", tmp_path / "eval.json")


@pytest.mark.parametrize(("error", "code"), [(InputError("x"), 2), (RunFault("x"), 1), (RunInterrupted("x"), 130)])
def test_exit_codes(monkeypatch, capsys, error, code):
    def fail(args):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "grade", fail)
    assert main(["grade"]) == code
    assert capsys.readouterr().err.strip().endswith("x")


def test_pairs_check_refuses_a_pair_that_is_not_what_it_says(capsys, material):
    rows = [json.loads(line) for line in (material / "pairs.jsonl").read_text().splitlines()]
    assert main(["pairs", "check", "--pairs", str(material / "pairs.jsonl"), "--workers", "1"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert rows[0]["id"] in error
    assert "4 refused" in error
