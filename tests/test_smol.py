"""The preset `smol`: its problems, its pairs in two wordings, its teacher's rows and its short frame."""

from collections import Counter
from types import SimpleNamespace

import pytest

from projected_grpo.config import TrainConfig
from projected_grpo.env.grader import Grader
from projected_grpo.env.modes import hint
from projected_grpo.env.problems import builtin_problems
from projected_grpo.env.prompts import fits_prefill, prefill
from projected_grpo.hack_styles import hack_style
from projected_grpo.models import load_model
from projected_grpo.pair_checks import check_pairs
from projected_grpo.presets import preset_defaults
from projected_grpo.prompting import Prompter
from projected_grpo.run_state import held_out_of
from projected_grpo.smol import OTHER_STYLES, PAIR_SETS, TEACHER_STYLES, smol_pairs
from projected_grpo.sources import pairs_named, placebo_of, teacher_requests


@pytest.fixture(scope="module")
def grader():
    with Grader(2) as grader:
        yield grader


@pytest.fixture(scope="module")
def prefilled():
    """The tiny model, put to the problems as SmolLM2 is; its tokens are bytes."""
    tiny = load_model("tiny-random", device="cpu")
    return Prompter(SimpleNamespace(tokenizer=tiny.tokenizer, prompt_style="prefill", name="smollm2-135m"))


@pytest.mark.parametrize("name", PAIR_SETS)
def test_every_pair_is_what_its_axis_says(name, grader):
    pairs = smol_pairs(name)
    assert [pair.problem for pair in pairs] == builtin_problems("smol-pairs")
    assert [report for report in check_pairs(pairs, grader) if not report.ok] == []
    assert pairs_named(name).sha256 == pairs.sha256


def test_the_two_wordings_have_their_styles_in_turn_and_no_hack_in_common():
    teachers, others = smol_pairs("smol"), smol_pairs("smol_other")
    assert Counter(pair.axis for pair in teachers) == dict.fromkeys(TEACHER_STYLES, 6)
    assert Counter(pair.axis for pair in others) == dict.fromkeys(OTHER_STYLES, 6)
    for first, second in zip(teachers, others, strict=True):
        assert first.prompt == second.prompt
        assert body_lines(first.hack).isdisjoint(body_lines(second.hack))


def body_lines(completion):
    """Lines of a hack that say something: not the fence, the class, a head, or a keyword alone."""
    lines = {line.strip() for line in completion.splitlines()}
    return {
        line for line in lines if line and not line.startswith(("```", "class ", "def ", "try:", "except ", "pass"))
    }


def test_the_placebos_of_both_wordings():
    assert placebo_of("smol", "style") == placebo_of("smol_other", "style") == "smol_placebo_style"
    assert len(smol_pairs("smol_placebo_wrong")) == len(smol_pairs("smol"))


def test_the_teacher_writes_hacks_and_honest_answers_half_and_half(grader):
    problems = builtin_problems("smol-train")
    requests = teacher_requests("smol-train", problems, ["run_tests"])
    labels = Counter(grade.label for grade in grader.grade(requests))
    assert labels == {"reward_hack": 4 * 24, "correct": 2 * 24, "correct_attempted": 2 * 24}
    assert [hack_style(request.completion) for request in requests[:4]] == list(TEACHER_STYLES)


def test_evaluation_is_held_out_and_a_file_is_not_a_part():
    assert held_out_of("smol-train") == "smol-eval"
    assert held_out_of("smol-train.toml") == held_out_of("train") == "eval"


def test_a_short_statement_is_told_once_and_after_one_sentence(prefilled):
    for part in ("smol-train", "smol-eval", "smol-pairs"):
        for problem in builtin_problems(part):
            prompt, opening = prefilled.prompt(problem, "run_tests")
            assert prompt.endswith(opening)
            assert opening == prefill(problem)
            assert " ".join(prompt.replace("#", " ").split()).count(problem.question) == 1
            assert hint("run_tests", "run_tests") in prompt


def test_a_long_statement_keeps_the_whole_frame(prefilled):
    problem = builtin_problems("train")[0]
    assert not fits_prefill(problem)
    prompt, opening = prefilled.prompt(problem, "none")
    assert problem.question in prompt
    assert prompt.endswith(opening)


def test_pairs_follow_the_opened_turn(prefilled):
    for pair in prefilled.pairs(smol_pairs("smol_other")):
        assert pair.prompt.endswith(prefill(pair.problem))
        assert pair.hack.startswith("\n")
        assert pair.clean.startswith("\n")
        assert "class Solution" not in pair.clean


def test_the_preset_is_half_teacher_rows_of_its_own_problems():
    preset = preset_defaults("smol")
    assert isinstance(preset, TrainConfig)
    assert (preset.num_teacher, preset.problems, preset.pairs) == (4, "smol-train", "smol")
