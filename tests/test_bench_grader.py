"""The grader's benchmark: what it measures and reports, on problems of a line each. Nothing here is about speed."""

import json
from dataclasses import asdict, replace

import pytest
from test_prompts import PROBLEM

from projected_grpo.bench.grader import (
    Report,
    Row,
    format_report,
    measure,
    own_time,
    program_of,
    run_fresh,
    save_report,
)
from projected_grpo.cli import main
from projected_grpo.errors import RunFault

SECOND = replace(
    PROBLEM,
    id="p-2",
    tests=("assert Solution().addTwo(a = 1, b = 2) == 2",),
    canonical_solution=PROBLEM.canonical_solution.replace("+", "*"),
)
SETTINGS = {"workers": 1, "repeats": 1, "rounds": 1}


def sleeping(seconds: float):
    """A problem whose canonical solution sleeps in each of its two tests."""
    code = f"import time\n\n\nclass Solution:\n    def addTwo(self, a, b):\n        time.sleep({seconds})\n"
    return replace(PROBLEM, canonical_solution=code + "        return a + b\n")


def test_two_small_problems_are_measured_on_both_sides(tmp_path):
    report = measure([PROBLEM, SECOND], **SETTINGS)
    assert [row.id for row in report.rows] == ["p-1", "p-2"]
    for row in report.rows:
        assert min(row.own, row.grader, row.fresh) > 0
        assert row.overheads == (row.grader - row.own, row.fresh - row.own)
    assert min(report.grader_rate, report.fresh_rate, report.rate_ratio) > 0
    assert (report.fast, report.workers) == (2, 1)
    rows, overhead, rate = format_report(report).splitlines()
    assert rows.startswith("2 rows, median own run time ")
    assert "(to hold: at most 1/8 and 6 ms)" in overhead
    assert "(to hold: at least 8)" in rate
    assert "2 rows under 2 ms" in rate
    save_report(report, tmp_path / "deep" / "grader.json")
    saved = json.loads((tmp_path / "deep" / "grader.json").read_text())
    assert saved["rows"][1] == asdict(report.rows[1])
    assert saved["rate_ratio"] == report.rate_ratio


@pytest.mark.parametrize("seconds", [0.004, 0.04])
def test_rows_that_are_all_slow_still_make_a_report(seconds):
    """A user's file may hold nothing else."""
    report = measure([sleeping(seconds)], **SETTINGS)
    assert report.fast == 0
    assert "own run time" in format_report(report)


def test_the_report_sets_slow_rows_apart():
    rows = (Row("a", 1.0, 2.0, 21.0), Row("b", 1.0, 2.0, 21.0), Row("c", 100.0, 105.0, 130.0))
    text = format_report(Report(rows, 500.0, 40.0, 12.5, 2, 2))
    assert text.splitlines()[0] == "2 rows, median own run time 1.00 ms"
    assert "median: 1.00 ms; a fresh interpreter: 20.00 ms; ratio 1/20.0 (to hold: at most 1/8 and 6 ms)" in text
    assert "500; fresh interpreters: 40.0; 12.5 times (to hold: at least 8)" in text
    assert "slow by themselves (50 ms or more), apart: mean own run time 100 ms" in text
    assert "graded in 105 ms, in a fresh interpreter 130 ms" in text


def test_a_canonical_solution_that_fails_is_a_fault():
    for wrong in ("return a - b", "return a // 0", "return None"):
        code = PROBLEM.canonical_solution.replace("return a + b", wrong)
        with pytest.raises(RunFault, match="canonical solution of problem p-2 does not pass"):
            measure([PROBLEM, replace(SECOND, canonical_solution=code)], **SETTINGS)


def test_what_fails_in_a_plain_interpreter_is_a_fault():
    wrong = replace(PROBLEM, canonical_solution=PROBLEM.canonical_solution.replace("a + b", "a - b"))
    with pytest.raises(RunFault, match=r"(?s)problem p-1: the canonical solution failed: .*AssertionError"):
        own_time(wrong)
    with pytest.raises(RunFault, match=r"(?s)failed in a plain interpreter: .*AssertionError"):
        run_fresh(program_of(wrong))
    assert own_time(PROBLEM) > 0
    run_fresh(program_of(PROBLEM))


def test_the_command_prints_the_report_and_writes_its_numbers(capsys, material, tmp_path):
    out = tmp_path / "grader.json"
    few = ["--workers", "1", "--repeats", "1", "--rounds", "1", "--out", str(out)]
    assert main(["bench", "grader", "--problems", str(material / "problems.toml"), *few]) == 0
    text = capsys.readouterr().out
    assert text.startswith("3 rows, median own run time")
    assert "(to hold: at least 8)" in text
    assert f"wrote {out}" in text
    assert len(json.loads(out.read_text())["rows"]) == 3
    assert main(["bench", "grader", *few]) == 2
    assert f"--out {out} exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--workers", "0"], "--workers 0 must be at least 1"),
        (["--workers", "-1"], "--workers -1 must be at least 1"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--problems"], "--problems names nothing"),
        (["--problems", "eval", "eval"], "the same ids"),
        (["--problems", "absent.toml"], "absent.toml: no such file"),
        (["--workers", "many"], "many"),
    ],
)
def test_bad_arguments_are_refused(capsys, args, says):
    assert main(["bench", "grader", *args]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    assert says in error


def test_problems_without_a_canonical_solution_are_refused(capsys, tmp_path, material):
    text = (material / "problems.toml").read_text()
    (tmp_path / "p.toml").write_text(text.replace("canonical_solution", "old_solution"))
    assert main(["bench", "grader", "--problems", str(tmp_path / "p.toml")]) == 2
    assert "problem double has no canonical solution to time (3 such)" in capsys.readouterr().err
