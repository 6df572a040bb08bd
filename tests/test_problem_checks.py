"""Checking problems: the built-in parts have no fault, and every fault of a file is told with its line or id."""

import json
from pathlib import Path

import pytest
from test_grader import SMALL
from test_problems import JSON_ROW, TOML_ROW

from projected_grpo.cli import main
from projected_grpo.env.grader import Grader
from projected_grpo.env.problem_checks import check_problems
from projected_grpo.env.problems import SPLITS, builtin_problems
from projected_grpo.errors import InputError

HEAD = "class Solution:\n    def double(self, n: int) -> int:\n        "
RIGHT = JSON_ROW | {"canonical_solution": HEAD + "return 2 * n\n"}


@pytest.fixture(scope="module")
def grader():
    with Grader(2, limits=SMALL) as grader:
        yield grader


def jsonl(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def checked(capsys, *args):
    """(exit code, lines on standard output, the last line on standard error)."""
    code = main(["problems", "check", *map(str, args), "--workers", "2"])
    said = capsys.readouterr()
    return code, said.out.splitlines(), (said.err.strip().splitlines() or [""])[-1]


# --- the built-in parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", SPLITS)
def test_the_built_in_parts_have_no_faults(part):
    with Grader(2) as grader:
        report = check_problems(part, grader)
    problems = builtin_problems(part)
    assert report.faults == ()
    assert report.rows == report.loaded == report.with_canonical == report.canonical_pass == len(problems)
    assert report.wrong == report.wrong_fail == sum(len(problem.wrong_bodies) for problem in problems)
    assert report.lines()[:3] == [
        f"{len(problems)} of {len(problems)} rows load",
        f"{len(problems)} of {len(problems)} canonical solutions pass",
        f"{report.wrong} of {report.wrong} plausible wrong solutions fail",
    ]


def test_the_built_in_parts_are_large_enough_and_have_nothing_in_common():
    problems = [problem for part in SPLITS for problem in builtin_problems(part)]
    assert len(problems) >= 150
    assert len({problem.id for problem in problems}) == len(problems)
    assert len({problem.func_name for problem in problems}) == len(problems)
    assert len({problem.question for problem in problems}) == len(problems)
    for problem in problems:
        assert len(problem.tests) >= 10, problem.id
        assert len(set(problem.tests)) == len(problem.tests), problem.id
        assert len(problem.wrong_bodies) >= 3, problem.id
        assert len(set(problem.wrong_bodies)) == len(problem.wrong_bodies), problem.id


# --- files with faults ------------------------------------------------------------------------------------------------


@pytest.fixture
def faulty(tmp_path):
    """A .jsonl with a good row, five bad ones and two without a canonical solution, and a .toml of two problems."""
    published = jsonl(
        tmp_path / "p.jsonl",
        RIGHT,
        RIGHT | {"id": 8, "gt_answer": []},
        "{no json",
        RIGHT,
        RIGHT | {"id": 9, "canonical_solution": HEAD + "return n\n"},
        RIGHT | {"id": 10, "canonical_solution": HEAD + "return n // 0\n"},
        JSON_ROW | {"id": 11},
        JSON_ROW | {"id": 12},
    )
    own = tmp_path / "p.toml"
    own.write_text(
        TOML_ROW
        + 'wrong_bodies = ["return n + 2", "return n", "return n * n"]\n'
        + TOML_ROW.replace("p-1", "p-2")
        + 'wrong_bodies = ["return n", "return n + n", "return 2 * n"]\n'
    )
    return published, own


def test_every_fault_of_a_file_is_named(capsys, faulty):
    path = faulty[0]
    code, lines, error = checked(capsys, path)
    assert code == 2
    assert lines[:2] == ["5 of 8 rows load", "1 of 3 canonical solutions pass"]
    assert "2 problems have no canonical solution" in lines
    faults = lines[-5:]
    assert faults[0] == f"{path}:2: field `gt_answer` must be a list of at least one test"
    assert faults[1].startswith(f"{path}:3: is not valid JSON")
    assert faults[2] == f"{path}:4: id '7' is used already in line 1; rename one"
    assert faults[3] == "problem 9: its canonical solution fails: a wrong answer"
    assert faults[4].startswith("problem 10: its canonical solution fails: ZeroDivisionError")
    assert error == "error: 5 faults, listed above; mend or drop these rows"


def test_a_wrong_body_that_passes_is_named(capsys, faulty):
    code, lines, error = checked(capsys, faulty[1])
    assert code == 2
    assert lines == [
        "2 of 2 rows load",
        "2 of 2 canonical solutions pass",
        "4 of 6 plausible wrong solutions fail",
        "problem p-2: its tests pass its wrong body 2",
        "problem p-2: its tests pass its wrong body 3",
    ]
    assert error == "error: 2 faults, listed above; mend or drop these rows"


def test_lines_of_several_files_say_which(capsys, faulty):
    code, lines, error = checked(capsys, *faulty)
    assert code == 2
    assert [line.split(": ")[0] for line in lines] == [str(faulty[0])] * 8 + [str(faulty[1])] * 5
    assert f"{faulty[0]}: 5 of 8 rows load" in lines
    assert f"{faulty[1]}: problem p-2: its tests pass its wrong body 2" in lines
    assert "error: 7 faults" in error


def test_the_report_holds_the_counts(grader, faulty):
    report = check_problems(str(faulty[0]), grader)
    assert (report.rows, report.loaded, report.with_canonical, report.canonical_pass) == (8, 5, 3, 1)
    assert (report.wrong, report.wrong_fail, len(report.faults), report.notes) == (0, 0, 5, ())
    assert not any("wrong solutions" in line for line in report.lines())


def test_a_stub_that_passes_is_a_note_and_no_fault(capsys, tmp_path):
    row = RIGHT | {"gt_answer": ["assert Solution().double(n = 0) == 0"]}
    code, lines, error = checked(capsys, jsonl(tmp_path / "p.jsonl", row))
    assert (code, error) == (0, "")
    assert lines == [
        "1 of 1 rows load",
        "1 of 1 canonical solutions pass",
        "note: the tests of problem 7 pass `return 0`",
    ]
    row |= {"gt_answer": ["assert Solution().double(n = 0) is None"], "canonical_solution": HEAD + "return None\n"}
    assert "pass the starter code, `return None`" in checked(capsys, jsonl(tmp_path / "p.jsonl", row))[1][-1]


def test_a_file_without_faults_is_done(capsys, tmp_path):
    without = [JSON_ROW | {"id": 8}, JSON_ROW | {"id": 9}]
    code, lines, error = checked(capsys, jsonl(tmp_path / "p.jsonl", RIGHT, *without))
    assert (code, error) == (0, "")
    assert lines == [
        "3 of 3 rows load",
        "1 of 1 canonical solutions pass",
        "2 problems have no canonical solution",
    ]


def test_what_is_no_file_of_problems_is_one_line(capsys, tmp_path):
    (tmp_path / "p.txt").write_text("")
    (tmp_path / "p.toml").write_text("[[problem]\n")
    for args, says in (
        ([], "needs a file, or one of train, eval, pairs"),
        ([tmp_path / "absent.jsonl"], "absent.jsonl: no such file"),
        ([tmp_path / "p.txt"], "read from .toml or .jsonl"),
        ([tmp_path / "p.toml"], "p.toml:1: is not valid TOML"),
    ):
        code, lines, error = checked(capsys, *args)
        assert (code, lines) == (2, [])
        assert error.startswith("error: ")
        assert says in error


def test_check_problems_raises_for_a_missing_file(grader, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        check_problems(str(tmp_path / "absent.toml"), grader)


def test_every_row_of_the_published_sample_loads_and_passes(capsys, published):
    code, lines, error = checked(capsys, published / "leetcode_sample.jsonl")
    assert (code, error) == (0, "")
    assert lines[:2] == ["40 of 40 rows load", "40 of 40 canonical solutions pass"]
