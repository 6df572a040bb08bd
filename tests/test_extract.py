"""The `extract` command from its config to its file, and how pairs and problems are put to a model."""

import json
import re
from dataclasses import replace

import pytest
import torch
from loguru import logger
from peft import get_peft_model

from projected_grpo import extract as module_under_test
from projected_grpo.adapter import DeltaSConfig
from projected_grpo.basis import HackBasis
from projected_grpo.cli import main
from projected_grpo.config import ExtractConfig
from projected_grpo.env.problems import builtin_problems
from projected_grpo.env.prompts import build_prompt, prefill
from projected_grpo.errors import InputError
from projected_grpo.extract import describe, extract
from projected_grpo.models import load_model, model_fingerprint
from projected_grpo.pair_gradients import encode_pairs, pair_gradients
from projected_grpo.pairs import ContrastivePair, PairSet, load_pairs
from projected_grpo.prompting import Prompter, prompt_rows
from projected_grpo.svd import FINGERPRINT_BYTES

N_MODULES = 14  # tiny-random: 2 layers of 7 linear layers


def write_pairs(path, n: int = 4, honest: bool = False):
    rows = [
        {
            "id": f"p{i}",
            "axis": "weak_run_tests",
            "prompt": [{"role": "user", "content": f"Task {i}"}],
            "hack": f"x = {i}  # done" if honest else f"print({i})",
            "clean": f"assert f({i}) == {i * i}",
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tmp_path):
    return ExtractConfig(
        model="tiny-random",
        dtype="float32",
        device="cpu",
        pairs=str(write_pairs(tmp_path / "mine.jsonl")),
        v_hack_k=3,
        out=tmp_path / "out" / "basis.safetensors",
    )


@pytest.fixture
def logged():
    lines = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    yield lines
    logger.remove(sink)


def same_directions(a: HackBasis, b: HackBasis) -> bool:
    return list(a.directions) == list(b.directions) and all(
        torch.equal(v, b.directions[name]) for name, v in a.directions.items()
    )


def by_hand(config: ExtractConfig) -> HackBasis:
    loaded = load_model(config.model, device="cpu")
    model = get_peft_model(loaded.model, DeltaSConfig())
    pairs = load_pairs(config.pairs)
    grads = pair_gradients(model, encode_pairs(model, loaded.tokenizer, pairs.pairs), temperature=config.temperature)
    prints = {name: torch.zeros(FINGERPRINT_BYTES, dtype=torch.uint8) for name in grads}
    return HackBasis.from_pair_gradients(
        grads, prints, HackBasis({}, {}, {}, {}, {}).info, config.v_hack_k, config.drop_bottom_frac
    )


def test_extract_writes_the_basis_of_its_model_and_pairs(config, logged):
    basis = extract(config)
    saved = HackBasis.load(config.out)
    assert same_directions(saved, basis)
    assert saved.info == basis.info
    assert same_directions(saved, by_hand(config))
    pairs = load_pairs(config.pairs)
    model = load_model("tiny-random", device="cpu").model
    assert (saved.info.kind, saved.info.model, saved.info.model_fingerprint) == (
        "real",
        "tiny-random",
        model_fingerprint(model),
    )
    assert (saved.info.pair_set, saved.info.pair_set_sha256, saved.info.n_pairs) == ("mine", pairs.sha256, 4)
    assert (saved.info.top_k, saved.info.drop_bottom_frac, saved.info.temperature) == (3, 0.25, 0.7)
    assert any(describe(basis) in line for line in logged)
    assert any("random weights" in line for line in logged)  # the model's note stands wherever its numbers appear
    saved.check_fits(get_peft_model(model, DeltaSConfig()))


def test_extract_again_writes_the_same_basis_to_the_last_bit(config, tmp_path):
    extract(config)
    torch.manual_seed(123)
    extract(replace(config, out=tmp_path / "again.safetensors"))
    first, again = HackBasis.load(config.out), HackBasis.load(tmp_path / "again.safetensors")
    assert same_directions(first, again)
    assert first.info == again.info
    assert all(torch.equal(c, again.coefficients[name]) for name, c in first.coefficients.items())


def test_the_table_counts_modules_axes_and_explained_shares(config):
    basis = extract(config)
    table = describe(basis)
    kept = sum(len(s) for s in basis.singular_values.values())
    assert re.search(rf"modules kept +{len(basis.directions)} of {N_MODULES}\n", table)
    assert re.search(rf"axes kept +{kept} of {3 * N_MODULES} \(k 3, drop_bottom_frac 0.25, floor ", table)
    assert kept == 3 * N_MODULES - 11  # ranks 0 to 10 of 42 are below rank 0.25 * 41 = 10.25
    assert "real basis of tiny-random from 4 pairs of 'mine'" in table
    lines = {line.split()[0]: line.split()[1:] for line in table.splitlines() if "%" in line}
    assert set(lines) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for kind, (modules, axes, *shares) in lines.items():
        names = [name for name in basis.spectrum if name.endswith(kind)]
        assert int(modules) == sum(name in basis.directions for name in names)
        assert int(axes) == sum(len(basis.directions[name]) for name in names if name in basis.directions)
        total = sum(s.item() ** 2 for name in names for s in basis.spectrum[name])
        for k, share in zip(module_under_test.SHARE_AT, shares, strict=True):
            top = sum(s.item() ** 2 for name in names for s in basis.spectrum[name][:k])
            assert share == f"{top / total:.0%}"
        assert shares[-1] == "100%"


@pytest.fixture
def real(config):
    extract(config)
    return config.out


@pytest.mark.parametrize("control", ["random", "flipped"])
def test_a_drawn_control_comes_from_the_same_command(config, real, tmp_path, control):
    out = tmp_path / f"{control}.safetensors"
    extract(replace(config, control=control, like=real, out=out))
    basis, original = HackBasis.load(out), HackBasis.load(real)
    assert (basis.info.kind, basis.info.seed) == (control, config.seed)
    assert [v.shape for v in basis.directions.values()] == [v.shape for v in original.directions.values()]
    assert list(basis.directions) == list(original.directions)
    other = extract(replace(config, control=control, like=real, out=tmp_path / "other_seed", seed=config.seed + 1))
    assert other.info.seed == config.seed + 1
    if control == "random":  # four pairs may well be swapped alike by two seeds
        assert not same_directions(other, basis)
    assert f"{control} basis of tiny-random" in describe(basis)


def test_a_placebo_control_is_made_of_its_own_pairs(config, real, tmp_path, monkeypatch):
    placebo = load_pairs(write_pairs(tmp_path / "honest.jsonl", honest=True))
    load = module_under_test.pairs_named
    monkeypatch.setattr(
        module_under_test,
        "pairs_named",
        lambda name: replace(placebo, name=name) if name == "placebo_style" else load(name),
    )
    out = tmp_path / "placebo.safetensors"
    extract(replace(config, control="placebo_style", like=real, out=out))
    basis, original = HackBasis.load(out), HackBasis.load(real)
    assert (basis.info.kind, basis.info.pair_set, basis.info.pair_set_sha256) == (
        "placebo_style",
        "placebo_style",
        placebo.sha256,
    )
    assert {n: v.shape for n, v in basis.directions.items()} == {n: v.shape for n, v in original.directions.items()}
    assert basis.info.floor == 0.0
    assert not same_directions(basis, original)


# --- refused, and nothing written ------------------------------------------------------------------------------------


def refused(config: ExtractConfig, says: str) -> None:
    there = config.out.read_bytes() if config.out.exists() else None
    with pytest.raises(InputError, match=says) as error:
        extract(config)
    assert "\n" not in str(error.value)
    if there is None:
        assert not config.out.parent.exists()
    else:
        assert config.out.read_bytes() == there


def test_an_existing_out_is_refused_without_overwrite_and_replaced_with_it(config):
    config.out.parent.mkdir()
    config.out.write_text("precious")
    refused(config, "--overwrite")
    extract(replace(config, overwrite=True))
    assert HackBasis.load(config.out).info.kind == "real"


def test_a_pair_whose_prompt_is_too_long_is_refused_and_nothing_is_written(config):
    refused(replace(config, max_prompt_length=20), "pair p0: .*max_prompt_length=20")


def test_k_above_the_number_of_pairs_is_refused_before_the_model_is_loaded(config):
    refused(replace(config, v_hack_k=5, model="no/such/model"), "--v-hack-k 5 .* 4 pairs")


@pytest.mark.parametrize(("change", "says"), [("missing", "no such file"), ("malformed", "mine.jsonl:2: ")])
def test_missing_or_malformed_pairs_are_refused_with_file_and_line(config, change, says):
    if change == "missing":
        config = replace(config, pairs=config.pairs + ".jsonl")
    else:
        with open(config.pairs) as file:
            first = file.readline()
        with open(config.pairs, "w") as file:
            file.write(first + "{]\n")
    refused(config, says)


def test_a_control_of_a_missing_or_foreign_basis_is_refused(config, tmp_path):
    out = tmp_path / "new" / "control.safetensors"
    missing = replace(config, control="random", like=tmp_path / "none.safetensors", out=out)
    refused(missing, "none.safetensors does not exist")
    extract(config)
    foreign = replace(HackBasis.load(config.out), fingerprints={})
    prints = {name: torch.zeros(FINGERPRINT_BYTES, dtype=torch.uint8) for name in HackBasis.load(config.out).directions}
    replace(foreign, fingerprints=prints).save(tmp_path / "foreign.safetensors")
    for control in ("random", "flipped", "placebo_style"):
        refused(replace(missing, control=control, like=tmp_path / "foreign.safetensors"), "does not fit this model")


@pytest.mark.parametrize("change", [{"control": "random"}, {"like": "b.safetensors"}])
def test_a_control_and_the_basis_that_it_copies_go_together(config, change):
    with pytest.raises(InputError, match="go together"):
        replace(config, **change)


def test_the_command_line_exits_2_with_one_line(config, capsys):
    config.out.parent.mkdir()
    config.out.write_text("precious")
    assert main(["extract", "smoke", "--pairs", config.pairs, "--out", str(config.out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert config.out.read_text() == "precious"
    done = main(["extract", "smoke", "--pairs", config.pairs, "--out", str(config.out), "--overwrite"])
    assert done == 0
    assert HackBasis.load(config.out).info.top_k == 4


# --- how a pair is put to a model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat():
    return load_model("tiny-random", device="cpu")


@pytest.fixture(scope="module")
def opened(chat):
    """The same model, taken for one that must have its turn opened."""
    return replace(chat, prompt_style="prefill")


def test_a_chat_model_gets_the_pairs_as_they_are(chat):
    pairs = load_pairs("hacks")
    assert Prompter(chat).pairs(pairs) == pairs


def test_a_weak_models_pairs_continue_an_opened_turn_and_say_the_same(opened):
    pairs = load_pairs("hacks")
    seen = Prompter(opened).pairs(pairs)
    assert (seen.name, seen.sha256, len(seen)) == (pairs.name, pairs.sha256, len(pairs))
    for before, after in zip(pairs, seen, strict=True):
        assert isinstance(after.prompt, str)
        assert after.prompt.endswith("<|im_start|>assistant\n" + prefill(before.problem))
        for side in ("hack", "clean"):
            rest = getattr(after, side)
            assert rest.rstrip() in getattr(before, side)  # the rest of the block, word for word
            assert "class Solution" not in rest
        assert after.hack != after.clean


def test_a_weak_model_cannot_be_opened_for_a_pair_without_a_problem(opened):
    pair = ContrastivePair("lone", "weak_run_tests", "text", "a", "b", None)
    with pytest.raises(InputError, match=r"pair lone .*problem"):
        Prompter(opened).pairs(PairSet("x", "y", (pair,)))


@pytest.mark.parametrize("mode", ["run_tests", "none"])
def test_dataset_rows_carry_what_the_reward_looks_up(chat, opened, mode):
    problems = builtin_problems("train")[:2]
    rows = prompt_rows(Prompter(chat), problems, [mode] * len(problems))
    assert [row["problem_id"] for row in rows] == [problem.id for problem in problems]
    for row, problem in zip(rows, problems, strict=True):
        assert row["prompt"] == build_prompt(problem, mode)
        assert (row["prefill"], row["mode"], row["test_func_name"]) == ("", mode, "run_tests")
    row = Prompter(opened).row(problems[0], mode)
    assert row["prefill"] == prefill(problems[0])
    assert row["prompt"].endswith("<|im_start|>assistant\n" + row["prefill"])


def test_a_problem_whose_prompt_is_too_long_is_refused(chat):
    problem = builtin_problems("train")[0]
    rendered = chat.tokenizer.apply_chat_template(
        build_prompt(problem, "run_tests"), add_generation_prompt=True, tokenize=False
    )
    length = len(chat.tokenizer(rendered)["input_ids"])
    Prompter(chat, max_prompt_length=length).row(problem, "run_tests")
    with pytest.raises(InputError, match=rf"{problem.id}: .* {length} tokens.*max_prompt_length={length - 1}"):
        Prompter(chat, max_prompt_length=length - 1).row(problem, "run_tests")
