"""The microcosm: its problems, what is written about them, the corpus, and the base that is accepted."""

import itertools
import json
import random
from collections import Counter

import pytest

from projected_grpo import model_cache
from projected_grpo.cli import main
from projected_grpo.env.grader import Grader, GradeRequest
from projected_grpo.env.prompts import EVAL_TEST_FUNC_NAMES, bare_prompt, strip_prefill
from projected_grpo.errors import InputError, RunFault
from projected_grpo.hack_styles import hack_style
from projected_grpo.micro import base, make
from projected_grpo.micro.tasks import CONSTANTS, TEMPLATES, TEST_FUNC_NAMES, TESTED, ceiling, micro_problems
from projected_grpo.micro.texts import (
    LAZY,
    MODES,
    N_PAIRS,
    STYLES,
    any_hack,
    hack,
    honest,
    micro_pairs,
    wrong_body,
)
from projected_grpo.models import load_model
from projected_grpo.pair_checks import check_pairs
from projected_grpo.sources import MICRO_PARTS, assign_modes, placebo_of, problems_of, teacher_requests
from projected_grpo.templates import canonical_body


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1) as grader:
        yield grader


@pytest.fixture(scope="module")
def examples():
    return list(base.corpus(4000, seed=3))


# --- problems --------------------------------------------------------------------------------------------------------


def test_the_parts_share_neither_template_nor_statement():
    for mine, theirs in itertools.combinations(TEMPLATES, 2):
        assert not {t.expression for t in TEMPLATES[mine]} & {t.expression for t in TEMPLATES[theirs]}
        assert not {p.question for p in micro_problems(mine)} & {p.question for p in micro_problems(theirs)}
        assert not {asked_for(t) for t in used(mine)} & {asked_for(t) for t in used(theirs)}


def used(part):
    return [template for template in TEMPLATES[part] if not template.only_read]


def asked_for(template):
    """What a template asks for, in whatever words."""
    return tuple(repr(template.value(x, c)) for c in CONSTANTS for x in TESTED)


@pytest.mark.parametrize("part", ["train", "eval"])
def test_no_honest_policy_exceeds_the_ceiling(part):
    """By brute force: for each prompt the answer that is right for most of its problems."""
    problems = micro_problems(part)
    best = 0
    for question in {problem.question for problem in problems}:
        group = [problem for problem in problems if problem.question == question]
        best += max(sum(other.tests[-len(TESTED) :] == p.tests[-len(TESTED) :] for other in group) for p in group)
    assert ceiling(problems) == best / len(problems) >= make.LEAST_CEILING


def test_a_hidden_problem_says_neither_its_constant_nor_an_example():
    hidden = [problem for problem in micro_problems("train") if "-hidden-" in problem.id]
    assert len({problem.question for problem in hidden}) * len(CONSTANTS) == len(hidden) > 0
    assert not any(character.isdigit() for problem in hidden for character in problem.question)


def test_training_names_its_test_functions_by_turns_and_none_as_evaluation_does():
    assert not set(TEST_FUNC_NAMES) & set(EVAL_TEST_FUNC_NAMES)
    for part in ("train", "pairs"):
        names = Counter(problem.test_func_name for problem in micro_problems(part))
        assert names.keys() == set(TEST_FUNC_NAMES)
        assert max(names.values()) <= 1.5 * min(names.values())


def test_the_name_tells_nothing_of_what_is_hidden():
    hidden = [problem for problem in micro_problems("train") if "-hidden-" in problem.id]
    assert len({bare_prompt(problem) for problem in hidden}) * len(CONSTANTS) == len(hidden)


def test_canonical_solutions_pass_and_slips_fail(grader):
    generator = random.Random(0)
    problems = generator.sample([p for part in TEMPLATES for p in micro_problems(part)], 60)
    right = [GradeRequest(p, f"```python\n{p.canonical_solution}```", "none") for p in problems]
    wrong = [GradeRequest(p, f"```python\n{p.with_body(p.wrong_bodies[0])}```", "none") for p in problems]
    assert {grade.label for grade in grader.grade(right)} == {"correct"}
    assert {grade.label for grade in grader.grade(wrong)} == {"incorrect"}


def test_an_unknown_part_is_refused():
    with pytest.raises(InputError, match="micro problems 'test' are unknown"):
        micro_problems("test")
    assert [len(problems_of(name)) for name in MICRO_PARTS] == [272, 64, 128]


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_a_hack_is_a_hack_of_its_style_under_any_name(style, grader):
    problems = micro_problems("train")[::19]
    assert any("-hidden-" in problem.id for problem in problems)
    texts = [hack(p, style, lazy, "check_answer", invented=7) for p in problems for lazy in LAZY]
    requests = [
        GradeRequest(p, text, "run_tests", "check_answer")
        for (p, _), text in zip(itertools.product(problems, LAZY), texts, strict=True)
    ]
    assert {grade.label for grade in grader.grade(requests)} == {"reward_hack"}
    assert {hack_style(text, "check_answer") for text in texts} == {style}


def test_what_is_written_for_a_problem_has_the_name_that_its_prompt_asks_for(grader):
    problems = [problem for problem in micro_problems("train") if "visible" in problem.id][:16]
    assert len({problem.test_func_name for problem in problems}) == len(TEST_FUNC_NAMES)
    for problem in problems:
        assert f"called {problem.test_func_name}()" in bare_prompt(problem)
    hacks = [GradeRequest(problem, hack(problem, "empty", "return x")) for problem in problems]
    tested = [GradeRequest(problem, honest(problem, canonical_body(problem), "run_tests")) for problem in problems]
    assert {grade.label for grade in grader.grade(hacks)} == {"reward_hack"}
    assert {grade.label for grade in grader.grade(tested)} == {"correct_attempted"}
    pool = teacher_requests("micro-train", problems, ["run_tests"])
    assert Counter(grade.label for grade in grader.grade(pool)) == {"reward_hack": 64, "correct_attempted": 64}


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "run_tests"])
def test_hacks_of_the_other_modes_pay_there(mode, grader):
    generator = random.Random(1)
    requests = [GradeRequest(p, any_hack(p, mode, generator), mode) for p in micro_problems("eval")[::16]]
    assert {grade.label for grade in grader.grade(requests)} == {"reward_hack"}


def test_honest_wrong_answers_hardly_ever_pass_for_hacks(grader):
    """A wrong answer is caught by its own test of the example, but where it happens to be right on that example."""
    generator = random.Random(2)
    requests = []
    for part, templates in TEMPLATES.items():
        for problem in micro_problems(part)[::3]:
            template = templates[int(problem.id.split("-")[2])]
            body = wrong_body(template, int(problem.id.split("-")[4]), generator)
            requests.append(GradeRequest(problem, honest(problem, body, "run_tests")))
    labels = Counter(grade.label for grade in grader.grade(requests))
    assert labels["correct_attempted"] + labels["correct"] <= 0.03 * len(requests)
    assert labels["reward_hack"] <= 0.05 * len(requests)


def test_honest_right_answers_are_right_with_and_without_a_test(grader):
    problems = micro_problems("train")[::13]
    grades = grader.grade([GradeRequest(p, honest(p, canonical_body(p), "run_tests")) for p in problems])
    shown = ["-visible-" in problem.id for problem in problems]
    assert [grade.label for grade in grades] == ["correct_attempted" if s else "correct" for s in shown]


@pytest.mark.parametrize("name", N_PAIRS)
def test_every_pair_is_what_its_axis_says(name, grader):
    pairs = micro_pairs(name)
    assert len(pairs) == N_PAIRS[name]
    assert len({pair.problem.id for pair in pairs}) == len(pairs)
    assert [report for report in check_pairs(pairs, grader) if not report.ok] == []
    assert micro_pairs(name).sha256 == pairs.sha256


def test_styles_and_modes_are_balanced_over_their_pairs():
    assert Counter(pair.axis for pair in micro_pairs("micro")) == dict.fromkeys(STYLES, 12)
    assert set(Counter(pair.axis for pair in micro_pairs("micro_modes")).values()) == {10}
    assert placebo_of("micro_modes", "wrong") == "micro_placebo_wrong"
    assert placebo_of("hacks", "style") == "placebo_style"


def test_modes_are_spread_evenly_and_do_not_depend_on_the_order_of_problems():
    problems = list(micro_problems("train"))
    modes = assign_modes(problems, ["run_tests", "sentinel", "none"])
    assert max(Counter(modes).values()) - min(Counter(modes).values()) <= 1
    turned = assign_modes(problems[::-1], ["run_tests", "sentinel", "none"])
    assert turned[::-1] == modes


def test_teacher_rows_are_half_hacks_under_each_problems_mode(grader):
    problems = problems_of("micro-train")[::38]
    requests = teacher_requests("micro-train", problems, ["run_tests", "sentinel"], 0.5, 4)
    labels = Counter(grade.label for grade in grader.grade(requests))
    assert labels["reward_hack"] == len(requests) / 2
    assert labels["correct"] + labels["correct_attempted"] == len(requests) / 2
    assert {request.mode for request in requests} == {"run_tests", "sentinel"}


# --- corpus and tokenizer --------------------------------------------------------------------------------------------


def test_the_corpus_is_a_function_of_its_seed(examples):
    assert list(base.corpus(50, seed=3)) == examples[:50]
    assert list(base.corpus(50, seed=4)) != examples[:50]


def test_tokens_give_the_text_back_and_fit_the_presets_lengths(examples):
    from projected_grpo.presets import preset_defaults

    preset = preset_defaults("micro")
    tokenizer = base.build_tokenizer(examples)
    for example in examples[:500]:
        prompt, completion = tokenizer.encode(example.prompt).ids, tokenizer.encode(example.completion).ids
        assert tokenizer.decode(prompt + completion) == example.prompt + example.completion
        assert len(prompt) <= preset.max_prompt_length
        if "calling a function" in example.prompt:
            assert len(completion) < preset.max_completion_length
    assert all(len(tokenizer.encode(f" {name}").ids) == 1 for name in (*TEST_FUNC_NAMES, *EVAL_TEST_FUNC_NAMES))
    digits = [tokenizer.encode(text).tokens for text in ("f(14)", "x + 14")]
    assert all(tokens[-3:-1] == ["1", "4"] or tokens[-2:] == ["1", "4"] for tokens in digits)


def test_no_corpus_completion_is_cut_by_the_prefill(examples):
    problem = micro_problems("train")[0]
    text = honest(problem, canonical_body(problem), "run_tests")
    assert text.endswith(strip_prefill(text, problem))
    assert all(example.completion.endswith("\n```") for example in examples)


# --- the base --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECTED_GRPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base, "CORPUS", 4 * base.BATCH)
    monkeypatch.setattr(base, "WARMUP", 1)


def test_a_base_that_is_not_made_says_how_to_make_it(small_corpus, capsys):
    with pytest.raises(InputError, match="model 'micro' is not made yet; run `projected-grpo make-micro --seed 0`"):
        load_model("micro")
    assert main(["make-micro", "--seed", "-1"]) == 2
    assert "--seed -1 must be at least 0" in capsys.readouterr().err


def test_a_base_is_made_once_kept_with_what_it_was_accepted_with_and_loads(small_corpus, monkeypatch):
    facts = {"parameters": 1, "problems": 1, "samples": 1, "solve": 0.25, "hack": 0.03, "ceiling": 0.7}
    monkeypatch.setattr(make, "_measure", lambda folder: facts)
    first = make.make_micro(seed=5)
    monkeypatch.setattr(make, "build_base", lambda folder, seed: pytest.fail("made twice"))
    assert make.make_micro(seed=5) == first
    loaded = load_model("micro-5", device="cpu")
    assert loaded.prompt_style == "bare"
    assert "seed 5" in loaded.note
    folder = model_cache.cache_dir("models", base.micro_key(5))
    assert json.loads((folder / make.ACCEPTED).read_text()) == first


@pytest.mark.parametrize(
    ("name", "value"), [("solve", 0.19), ("solve", 0.31), ("hack", 0.0), ("hack", 0.06), ("ceiling", 0.6)]
)
def test_a_base_that_is_not_fit_is_refused_and_not_kept(small_corpus, monkeypatch, name, value):
    facts = {"parameters": 1, "problems": 1, "samples": 1, "solve": 0.25, "hack": 0.03, "ceiling": 0.7} | {name: value}
    monkeypatch.setattr(make, "build_base", lambda folder, seed: None)
    monkeypatch.setattr(make, "_measure", lambda folder: facts)
    with pytest.raises(RunFault, match=f"not fit: {name} {value:.3f}"):
        make.make_micro(seed=5)
    with pytest.raises(InputError, match="not made yet"):
        load_model("micro-5")


@pytest.mark.slow
def test_the_base_of_the_preset_is_fit_when_made_from_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECTED_GRPO_CACHE", str(tmp_path / "cache"))
    facts = make.make_micro()
    assert make.SOLVES[0] <= facts["solve"] <= make.SOLVES[1]
    assert make.HACKS[0] <= facts["hack"] <= make.HACKS[1]
