"""Loading problems: both formats, and every refusal with its file and line."""

import json
from pathlib import Path

import pytest

from projected_grpo.env.problems import SPLITS, builtin_problems, load_problems
from projected_grpo.errors import InputError

TOML_ROW = """
[[problem]]
id = "p-1"
title = "Double"
difficulty = "easy"
func_name = "double"
statement = '''
Return twice the integer n.
'''
starter_code = '''class Solution:
    def double(self, n: int) -> int:
        # Add your code here
'''
canonical_solution = '''class Solution:
    def double(self, n: int) -> int:
        return 2 * n
'''
tests = ["assert Solution().double(n = 2) == 4", "assert Solution().double(n = -1) == -2"]
"""

JSON_ROW = {
    "id": 7,
    "question": "PROBLEM:\nReturn twice n.\n\nYour solution to the problem should be a method of the class Solution "
    "called double and should pass all tests. Use the following starter code:\n```python\nclass Solution:\n"
    "    def double(self, n: int) -> int:\n        # Add your code here\n```\n\nSOLUTION:\n",
    "func_name": "Solution().double",
    "gt_answer": ["assert Solution().double(n = 2) == 4"],
    "difficulty": "medium",
    "setup_code": "from typing import *\n",
    "prompt_metadata": {"starter_code": "class Solution:\n    def double(self, n: int) -> int:\n        "},
}


def written(tmp_path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_both_formats_give_the_same_kind_of_problem(tmp_path):
    (own,) = load_problems(written(tmp_path, "p.toml", TOML_ROW))
    (published,) = load_problems(written(tmp_path, "p.jsonl", json.dumps(JSON_ROW) + "\n"))
    assert (own.id, own.func_name, own.question) == ("p-1", "double", "Return twice the integer n.")
    assert (published.id, published.func_name, published.question) == ("7", "double", "Return twice n.")
    assert own.starter_code == published.starter_code
    assert published.canonical_solution == ""
    assert "import" in own.setup_code


def test_optional_fields_may_be_absent_or_null(tmp_path):
    row = JSON_ROW | {"hint": None, "canonical_solution": None, "test_func_name": ""}
    assert load_problems(written(tmp_path, "p.jsonl", json.dumps(row)))[0].canonical_solution == ""


def test_the_loopholes_function_has_a_name_of_the_problems_own_where_it_gives_one(tmp_path):
    first, second = load_problems(written(tmp_path, "p.toml", TOML_ROW + 'test_func_name = "assess"\n' + SECOND))
    assert (first.test_func_name, second.test_func_name) == ("assess", "run_tests")


def test_question_without_the_frame_is_the_statement(tmp_path):
    row = JSON_ROW | {"question": "Return twice n."}
    (problem,) = load_problems(written(tmp_path, "p.jsonl", json.dumps(row)))
    assert problem.question == "Return twice n."
    assert problem.starter_code.endswith("        # Add your code here")


SECOND = TOML_ROW.replace("p-1", "p-2")


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        (TOML_ROW + TOML_ROW, 20, "used already in line 2"),
        (TOML_ROW + SECOND.replace('func_name = "double"\n', ""), 20, "`func_name` is missing"),
        (TOML_ROW + SECOND.replace("double(n = -1) == -2", "double(n = == 2"), 20, "test 2 does not parse"),
        (TOML_ROW + SECOND.replace("== -2", "== helper(2)"), 20, "test 2 uses the name `helper`"),
        (TOML_ROW + "[[problem]\n", 19, "not valid TOML"),
        (TOML_ROW.split("tests =")[0] + "tests = []\n", 2, "at least one test"),
        (TOML_ROW.split("tests =")[0] + "tests = [3]\n", 2, "test 1 is int"),
        (TOML_ROW.replace("return 2 * n", "return 2 *"), 2, "canonical_solution does not parse"),
        (TOML_ROW.replace('func_name = "double"', 'func_name = "triple"'), 2, "does not define triple"),
        (TOML_ROW + 'test_func_name = "run tests"\n', 2, "test_func_name 'run tests' is no name of a function"),
    ],
)
def test_refusals_of_toml_name_file_and_line(tmp_path, text, line, what):
    path = written(tmp_path, "p.toml", text)
    with pytest.raises(InputError) as caught:
        load_problems(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    assert what in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        (json.dumps(JSON_ROW) + "\n" + json.dumps(JSON_ROW), 2, "used already in line 1"),
        ("\n" + json.dumps(JSON_ROW | {"gt_answer": []}), 2, "at least one test"),
        ("{not json", 1, "not valid JSON"),
        ("[1]", 1, "no JSON object"),
        (json.dumps(JSON_ROW | {"gt_answer": ["assert Solution().double("]}), 1, "test 1 does not parse"),
        (json.dumps({k: v for k, v in JSON_ROW.items() if k != "id"}), 1, "`id` is missing"),
        (json.dumps(JSON_ROW | {"question": 3}), 1, "`question` is int"),
    ],
)
def test_refusals_of_jsonl_name_file_and_line(tmp_path, text, line, what):
    path = written(tmp_path, "p.jsonl", text)
    with pytest.raises(InputError) as caught:
        load_problems(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert what in str(caught.value)


def test_missing_empty_and_foreign_files_are_refused(tmp_path):
    for path in (tmp_path / "absent.toml", written(tmp_path, "e.jsonl", "\n"), written(tmp_path, "x.csv", "a,b")):
        with pytest.raises(InputError, match=path.name):
            load_problems(path)
    with pytest.raises(InputError, match="split"):
        builtin_problems("test")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("q.toml", b"problem = [1, 2]\n", "q.toml: `problem` is no array of tables"),
        ("q.toml", b"[problem]\nid = 'x'\n", "q.toml: `problem` is no array of tables"),
        ("q.toml", b"\xff", "q.toml: is not UTF-8 text"),
        ("q.jsonl", b"\xff", "q.jsonl:1: is not UTF-8 text"),
    ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"^[^\n]*{what}[^\n]*$"):
        load_problems(tmp_path / name)


def test_builtin_parts_are_disjoint():
    problems = [p for split in SPLITS for p in builtin_problems(split)]
    assert len(problems) >= 150
    assert len({p.id for p in problems}) == len({p.func_name for p in problems}) == len(problems)
    assert len({p.question for p in problems}) == len(problems)
    assert min(len(p.tests) for p in problems) >= 10
