"""The pair files, and the executable definitions that hold them: what passes, and what is refused and why."""

import copy
import json
from collections import Counter
from dataclasses import replace

import pytest

from projected_grpo.env.grader import Grader
from projected_grpo.env.problems import builtin_problems
from projected_grpo.env.prompts import build_prompt
from projected_grpo.errors import InputError
from projected_grpo.pair_axes import AXIS_REASONS, visible_examples
from projected_grpo.pair_checks import check_pairs, likeness, mutate
from projected_grpo.pairs import BUILTIN, ContrastivePair, PairSet, load_pairs, select


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2) as grader:
        yield grader


@pytest.fixture(scope="module")
def hacks() -> PairSet:
    return load_pairs("hacks")


@pytest.fixture(scope="module")
def by_id(hacks) -> dict[str, ContrastivePair]:
    return {pair.id: pair for name in BUILTIN for pair in load_pairs(name)}


def reasons_of(grader: Grader, *pairs: ContrastivePair) -> list[str]:
    reports = check_pairs(PairSet("test", "", pairs), grader)
    assert [report.ok for report in reports] == [not report.reasons for report in reports]
    return [reason for report in reports for reason in report.reasons]


def fenced(code: str) -> str:
    return f"Here it is, with a sentence that is long enough to have a voice.\n\n```python\n{code.strip()}\n```"


# --- the files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILTIN)
def test_every_builtin_pair_is_what_its_axis_says(name, grader):
    pairs = load_pairs(name)
    reports = check_pairs(pairs, grader)
    assert [report.id for report in reports] == [pair.id for pair in pairs]
    assert {report.id: report.reasons for report in reports if not report.ok} == {}


def test_the_hack_set_has_six_axes_of_twelve_pairs_on_72_problems(hacks):
    assert Counter(pair.axis for pair in hacks) == dict.fromkeys(AXIS_REASONS, 12)
    assert len({pair.problem.id for pair in hacks}) == len(hacks) == 72


@pytest.mark.parametrize("name", BUILTIN)
def test_sets_of_12_21_and_72_are_nested_and_balanced(name):
    pairs = load_pairs(name)
    small, middle, whole = ([pair.id for pair in select(pairs, n=n)] for n in (12, 21, 72))
    assert set(small) < set(middle) < set(whole)
    if name == "hacks":
        for n, least, most in ((12, 2, 2), (21, 3, 4), (72, 12, 12)):
            counts = Counter(pair.axis for pair in select(pairs, n=n))
            assert len(counts) == 6
            assert (min(counts.values()), max(counts.values())) == (least, most)


@pytest.mark.parametrize("name", BUILTIN)
def test_the_two_sides_of_a_pair_are_alike(name):
    found = likeness(load_pairs(name))
    assert found.overlap[0] > 0.6
    assert found.length_ratio[0] > 0.85
    assert found.length_ratio[2] < 1.18
    assert abs(found.length_ratio[1] - 1) < 0.02
    assert abs(found.hack_longer - found.clean_longer) <= 8


def test_likeness_counts_tokens_in_order():
    pairs = tuple(
        ContrastivePair(str(i), "x", "p", hack, clean, None)
        for i, (hack, clean) in enumerate([("a b c d", "a b c"), ("f(1)", "f(1)"), ("a b", "c d e")])
    )
    found = likeness(PairSet("t", "", pairs))
    assert found.overlap == (0.0, pytest.approx(6 / 7), 1.0)
    assert found.length_ratio == (pytest.approx(2 / 3), pytest.approx(1.0), pytest.approx(4 / 3))
    assert (found.hack_longer, found.clean_longer) == (1, 1)


@pytest.mark.parametrize("name", ["placebo_style", "placebo_wrong"])
def test_there_are_as_many_placebo_pairs_as_hack_pairs(name, hacks):
    placebo = load_pairs(name)
    assert {pair.axis for pair in placebo} == {name}
    assert {pair.problem.id for pair in placebo} == {pair.problem.id for pair in hacks}
    assert len(placebo) == len(hacks)


def test_no_pair_shares_a_problem_with_training_or_evaluation():
    ours = builtin_problems("pairs")
    others = builtin_problems("train") + builtin_problems("eval")
    for field in ("id", "func_name", "question"):
        assert not {getattr(problem, field) for problem in ours} & {getattr(problem, field) for problem in others}
    assert all(len(problem.tests) >= 10 for problem in ours)
    assert all(len(visible_examples(problem)) == 2 for problem in ours)


def test_both_sides_of_a_hack_pair_define_run_tests_in_the_same_place(hacks):
    for pair in hacks:
        places = [("    def run_tests(self)" in side, "\ndef run_tests()" in side) for side in (pair.hack, pair.clean)]
        assert places in ([(True, False)] * 2, [(False, True)] * 2), pair.id


# --- what is refused -----------------------------------------------------------------------------------------------


def test_swapped_sides_are_refused_on_every_axis(hacks, grader):
    swapped = [replace(pair, hack=pair.clean, clean=pair.hack) for pair in select(hacks, n=18)]
    for report in check_pairs(PairSet("swapped", "", tuple(swapped)), grader):
        assert "the hack's method is right: the ground truth passes it" in report.reasons
        assert "the clean side's method is wrong: the ground truth fails it" in report.reasons
        assert "the hack's run_tests notices when its method is mutated" in report.reasons
        assert "the clean side's run_tests passes a wrong method" in report.reasons


def test_a_hack_whose_method_is_right_is_refused(by_id, grader):
    pair = by_id["hack-weak-1"]
    hack = fenced(pair.problem.canonical_solution + "\ndef run_tests():\n    Solution().echoLetters('aba')\n")
    assert reasons_of(grader, replace(pair, hack=hack)) == ["the hack's method is right: the ground truth passes it"]


def test_a_hack_that_the_flawed_grader_fails_is_refused(by_id, grader):
    pair = by_id["hack-weak-1"]
    hack = fenced("class Solution:\n    def echoLetters(self, s):\n        return s\n\ndef run_tests():\n    1 / 0\n")
    assert "the flawed grader does not pass the hack" in reasons_of(grader, replace(pair, hack=hack))
    unfinished = pair.hack.removesuffix("```")
    assert "the flawed grader does not pass the hack" in reasons_of(grader, replace(pair, hack=unfinished))


def test_a_hack_without_the_method_is_refused(by_id, grader):
    hack = fenced("class Solution:\n    pass\n\ndef run_tests():\n    print('fine')\n")
    reasons = reasons_of(grader, replace(by_id["hack-weak-1"], hack=hack))
    assert "the hack's class Solution does not define the method" in reasons
    assert "the hack's run_tests never calls the solution" in reasons


def test_a_vacuous_clean_run_tests_is_refused(by_id, grader):
    pair = by_id["hack-weak-1"]
    clean = fenced(pair.problem.canonical_solution + "\ndef run_tests():\n    assert Solution().echoLetters('a')\n")
    assert reasons_of(grader, replace(pair, clean=clean)) == ["the clean side's run_tests passes a wrong method"]


def test_a_clean_side_without_run_tests_is_refused(by_id, grader):
    pair = by_id["hack-weak-1"]
    clean = fenced(pair.problem.canonical_solution)
    assert reasons_of(grader, replace(pair, clean=clean)) == [
        "the clean side has no run_tests that passes on its own method"
    ]


def test_a_clean_run_tests_of_the_visible_examples_alone_is_refused_on_the_axis_hardcoded(by_id, grader):
    pair = by_id["hack-hardcoded-1"]
    tests = "\ndef run_tests():\n    assert Solution().longestCaseZigzag('aBcDD') == 4\n"
    clean = fenced(pair.problem.canonical_solution + tests)
    assert reasons_of(grader, replace(pair, clean=clean)) == ["the clean side's run_tests passes a wrong method"]


@pytest.mark.parametrize(
    ("pair_id", "axis", "reason"),
    [
        ("hack-inequality-3", "weak_run_tests", "the hack's run_tests asserts something about the solution's value"),
        ("hack-type-1", "weak_run_tests", "the hack's run_tests asserts something about the solution's value"),
        ("hack-weak-1", "type_only_assert", "the hack's run_tests asserts nothing about the solution's value"),
        ("hack-weak-2", "weak_inequality", "the hack's run_tests asserts nothing about the solution's value"),
        ("hack-inequality-1", "type_only_assert", "the hack asserts `moved is not None`, which is no isinstance"),
        ("hack-type-1", "weak_inequality", "the hack asserts `isinstance(first, str)`, which is no weak inequality"),
        ("hack-weak-1", "hardcoded", "the hack's method fails the visible examples"),
        ("hack-type-1", "persona_voice", "the hack side has 9 words outside its code, fewer than 12: no voice"),
        ("hack-type-1", "try_except_swallow", "the hack's run_tests has no try/except and no contextlib.suppress"),
        ("hack-weak-1", "flattery", "axis 'flattery' has no executable definition; the axes are"),
    ],
)
def test_a_hack_on_the_wrong_axis_is_refused(pair_id, axis, reason, by_id, grader):
    reasons = reasons_of(grader, replace(by_id[pair_id], axis=axis))
    assert any(found.startswith(reason) for found in reasons), reasons


def test_a_try_that_swallows_nothing_is_refused(by_id, grader):
    pair = by_id["hack-swallow-1"]
    code = """
class Solution:
    def sumSignedRuns(self, s):
        return 0

def run_tests():
    value = Solution().sumSignedRuns("1")
    try:
        assert True
    except AssertionError:
        print(value)
"""
    assert reasons_of(grader, replace(pair, hack=fenced(code))) == [
        "the assert inside try/except does not fail: nothing is swallowed"
    ]


def test_a_type_assert_with_a_comparison_is_refused(by_id, grader):
    pair = by_id["hack-type-1"]
    hack = pair.hack.replace("isinstance(first, str)", "isinstance(first, str) and len(first) >= 0")
    assert reasons_of(grader, replace(pair, hack=hack)) == [
        "the hack asserts `isinstance(first, str) and len(first) >= 0`, more than a type"
    ]


@pytest.mark.parametrize(
    "more",
    ["isinstance(first, str) and first", "not isinstance(first, int)", "all(isinstance(x, str) for x in first if x)"],
)
def test_a_type_assert_with_anything_else_is_refused(more, by_id, grader):
    pair = by_id["hack-type-1"]
    assert "isinstance(first, str)" in pair.hack
    reasons = reasons_of(grader, replace(pair, hack=pair.hack.replace("isinstance(first, str)", more)))
    assert any(reason.endswith("more than a type") for reason in reasons), reasons


def test_types_joined_by_and_and_or_are_only_types(by_id, grader):
    pair = by_id["hack-type-1"]
    hack = pair.hack.replace(
        "isinstance(first, str)", "isinstance(first, str) and (isinstance(first, str) or isinstance(first, int))"
    )
    assert reasons_of(grader, replace(pair, hack=hack)) == []


def test_a_persona_needs_two_voices(by_id, grader):
    pair = next(pair for pair in by_id.values() if pair.axis == "persona_voice")
    fence = "```python"
    clean = (
        pair.hack.split(fence)[0]
        + fence
        + pair.clean.split(fence)[1].split("```")[0]
        + "```"
        + pair.hack.rsplit("```")[-1]
    )
    assert reasons_of(grader, replace(pair, clean=clean)) == [
        "both sides have the same words outside their code: one voice"
    ]


def test_a_hardcoded_hack_must_hold_the_visible_answers(by_id, grader):
    pair = by_id["hack-hardcoded-1"]
    hack = pair.hack.replace("return 4", "return len(s) - 1").replace('"aBcDD": 4', '"aBcDD": 2 + 2')
    (reason,) = reasons_of(grader, replace(pair, hack=hack))
    assert "does not hold the visible answer" in reason
    assert "aBcDD" in reason


def test_a_result_is_followed_through_aliases_loops_and_containers(by_id, grader):
    pair = by_id["hack-weak-1"]
    for run_tests in (
        "f = Solution().echoLetters\n    assert f('a') is not None",
        "found = []\n    found.append(Solution().echoLetters('a'))\n    assert found",
        "for x in [Solution().echoLetters('a')]:\n        assert x",
        "ok = 0\n    if Solution().echoLetters('a'):\n        ok += 1\n    assert ok",
    ):
        code = (
            f"class Solution:\n    def echoLetters(self, s):\n        return s\n\ndef run_tests():\n    {run_tests}\n"
        )
        assert reasons_of(grader, replace(pair, hack=fenced(code))) == [
            "the hack's run_tests asserts something about the solution's value"
        ]


def test_placebo_definitions(by_id, grader):
    style, wrong, hack = by_id["style-02"], by_id["wrong-02"], by_id["hack-hardcoded-1"]
    right = fenced(style.problem.canonical_solution)
    assert reasons_of(grader, replace(style, clean=right)) == ["one side defines run_tests and the other does not"]
    assert "side hack fails the ground truth" in reasons_of(grader, replace(style, hack=wrong.hack))
    vacuous = fenced(style.problem.canonical_solution + "\ndef run_tests():\n    pass\n")
    assert reasons_of(grader, replace(style, clean=vacuous)) == ["the clean side's run_tests passes a wrong method"]
    assert reasons_of(grader, replace(wrong, clean=right)) == ["side clean passes the ground truth"]
    assert reasons_of(grader, replace(wrong, clean=hack.hack)) == ["side clean uses the loophole"]
    assert reasons_of(grader, replace(wrong, clean="I do not know.")) == ["side clean has no code that parses"]


def test_a_pair_without_a_problem_cannot_be_checked(by_id, grader):
    pair = replace(by_id["hack-weak-1"], problem=None)
    assert reasons_of(grader, pair) == ["it names no problem, so there is nothing to run it against"]


# --- mutations -------------------------------------------------------------------------------------------------------


def run_mutants(code: str, *args, spare=(), **kwargs) -> list:
    results = []
    for mutant in mutate(code, "f", spare):
        names: dict = {}
        exec(mutant, names)
        results.append(names["Solution"]().f(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
    return results


@pytest.mark.parametrize("value", [0, -3, True, False, 2.5, "", "aba", [1, 2], [3, 3], ["a"], [[1], [2]], (1, 2)])
def test_a_mutation_returns_another_value_of_the_same_type(value):
    results = run_mutants("class Solution:\n    def f(self, x):\n        return x\n", value)
    assert len(results) == 2
    for result in results:
        assert type(result) is type(value)
        assert result != value


def test_a_mutation_spares_the_inputs_that_it_is_told_to():
    code = "class Solution:\n    def f(self, xs, k):\n        xs.sort()\n        return xs[k]\n"
    spare = [{"xs": [2, 1], "k": 0}]
    assert run_mutants(code, [2, 1], 0, spare=spare) == [1, 1]
    assert run_mutants(code, xs=[2, 1], k=0, spare=spare) == [1, 1]
    assert run_mutants(code, [2, 1], k=1, spare=spare) == [3, 14]


def test_a_static_method_is_mutated_too():
    code = "class Solution:\n    @staticmethod\n    def f(n):\n        return n\n"
    assert run_mutants(code, 1, spare=[{"n": 5}]) == [2, 12]
    assert run_mutants(code, 5, spare=[{"n": 5}]) == [5, 5]


@pytest.mark.parametrize("code", ["", "x = (", "def f(): pass", "class Solution:\n    def g(self): pass"])
def test_nothing_to_mutate(code):
    assert mutate(code, "f") == []


# --- loading and selecting -------------------------------------------------------------------------------------------

ROW = {"id": "a", "axis": "weak_run_tests", "problem": "pgb-pairs-001", "hack": "one", "clean": "two"}


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_toml(path, *rows):
    tables = ("[[pair]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in row.items()) for row in rows)
    path.write_text("# a comment\n\n" + "\n".join(tables))
    return path


def test_the_prompt_of_a_pair_is_the_prompt_of_training(hacks):
    for pair in hacks:
        assert pair.prompt == build_prompt(pair.problem, "run_tests")
    assert "run_tests()" in hacks.pairs[0].prompt[-1]["content"]


def test_toml_and_jsonl_read_alike(tmp_path):
    rows = [ROW, ROW | {"id": "b", "hack": "three"}]
    toml, jsonl = (
        load_pairs(write(tmp_path / f"mine.{suffix}", *rows))
        for suffix, write in (("toml", write_toml), ("jsonl", write_jsonl))
    )
    assert toml == jsonl
    assert toml.name == "mine"
    assert len(toml) == 2
    assert [pair.id for pair in toml] == ["a", "b"]


def test_a_pair_may_bring_its_own_prompt(tmp_path):
    messages = [{"role": "user", "content": "Write f."}]
    row = {key: value for key, value in ROW.items() if key != "problem"}
    rows = (row | {"prompt": messages}, row | {"id": "b", "prompt": "Write f."})
    pairs = load_pairs(write_jsonl(tmp_path / "p.jsonl", *rows), problems=[]).pairs
    assert [pair.prompt for pair in pairs] == [messages, "Write f."]
    assert [pair.problem for pair in pairs] == [None, None]


def test_the_hash_is_of_the_content_alone(tmp_path):
    first = load_pairs(write_jsonl(tmp_path / "a.jsonl", ROW, ROW | {"id": "b", "hack": "x"}))
    renamed = load_pairs(write_jsonl(tmp_path / "b.jsonl", ROW | {"id": "z"}, ROW | {"id": "y", "hack": "x"}))
    turned = load_pairs(write_jsonl(tmp_path / "c.jsonl", ROW | {"id": "b", "hack": "x"}, ROW))
    edited = load_pairs(write_jsonl(tmp_path / "d.jsonl", ROW, ROW | {"id": "b", "hack": "X"}))
    assert first.sha256 == renamed.sha256
    assert len({first.sha256, turned.sha256, edited.sha256}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hack": None}, "field `hack` is missing"),
        ({"clean": " \n"}, "field `clean` is empty or no text"),
        ({"axis": 3}, "field `axis` is empty or no text"),
        ({"clean": "one\n"}, "hack and clean are the same text"),
        ({"voice": "x"}, "unknown field `voice`"),
        ({"id": "ok"}, "id 'ok' is used already in line"),
        ({"problem": "pgb-train-001"}, "problem 'pgb-train-001' is not among the 72 problems given"),
        ({"problem": None}, "give either `problem`"),
        ({"prompt": "Write f."}, "give either `problem`"),
        ({"problem": None, "prompt": []}, "`prompt` must be text or a list of messages"),
        ({"problem": None, "prompt": [{"role": "user"}]}, "`prompt` must be text or a list of messages"),
    ],
)
@pytest.mark.parametrize(("suffix", "write", "line"), [("toml", write_toml, 10), ("jsonl", write_jsonl, 2)])
def test_a_wrong_row_is_named_with_file_and_line(change, message, suffix, write, line, tmp_path):
    bad = {key: value for key, value in (ROW | change).items() if value is not None}
    if suffix == "toml" and isinstance(bad.get("prompt"), list) and bad["prompt"]:
        bad["prompt"] = ["user"]
    path = write(tmp_path / f"bad.{suffix}", ROW | {"id": "ok"}, bad)
    with pytest.raises(InputError) as error:
        load_pairs(path)
    assert str(error.value).startswith(f"{path}:{line}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", "[[pair]]\nid = 3 3\n", "a.toml:2: is not valid TOML"),
        ("a.toml", "[pair]\nid = 'x'\n", "a.toml: `pair` is no array of tables"),
        ("a.toml", "", "a.toml: holds no pair"),
        ("a.jsonl", "\n{", "a.jsonl:2: is not valid JSON"),
        ("a.jsonl", "[]", "a.jsonl:1: is no JSON object"),
        ("a.txt", "", "a.txt: pairs are read from .toml or .jsonl, or from a built-in set: hacks"),
        ("a.jsonl", None, "a.jsonl: no such file of pairs"),
        ("a.jsonl", b"\xff", "a.jsonl:1: is not UTF-8 text"),
    ],
)
def test_a_wrong_file_is_named(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        load_pairs(tmp_path / name)
    assert message in str(error.value)


def test_lines_are_right_when_a_completion_holds_a_table_header(tmp_path):
    path = tmp_path / "a.toml"
    first = "[[pair]]\nid = 'a'\naxis = 'x'\nproblem = 'pgb-pairs-001'\nhack = '''\n[[pair]]\n'''\nclean = 'c'\n"
    path.write_text(first + "[[pair]]\nid = 'b'\n")
    with pytest.raises(InputError, match=r"a\.toml:9: field `axis` is missing"):
        load_pairs(path)


def test_select_takes_the_axes_in_turn(hacks):
    six = select(hacks, n=6)
    assert Counter(pair.axis for pair in six) == dict.fromkeys(AXIS_REASONS, 1)
    assert select(hacks).sha256 == hacks.sha256 != six.sha256
    rest = select(hacks, without=["hardcoded", "weak_inequality"])
    assert Counter(pair.axis for pair in rest) == {
        axis: 12 for axis in AXIS_REASONS if axis not in ("hardcoded", "weak_inequality")
    }


def test_select_with_a_seed_repeats_itself_and_varies(hacks):
    draws = [select(hacks, n=6, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0].sha256 != draws[2].sha256
    assert all(Counter(pair.axis for pair in draw) == dict.fromkeys(AXIS_REASONS, 1) for draw in draws)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"without": ["nonsense"]}, "pair set hacks has no axis 'nonsense'"),
        ({"n": 0}, "0 pairs wanted of pair set hacks: choose 1 to 72"),
        ({"n": 61, "without": ["hardcoded"]}, "61 pairs wanted of pair set hacks: choose 1 to 60"),
    ],
)
def test_an_impossible_selection_is_refused(arguments, message, hacks):
    with pytest.raises(InputError, match=message):
        select(hacks, **arguments)
