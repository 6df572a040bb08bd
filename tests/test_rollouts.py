"""Real rollouts of a model that learned to hack, beside the labels of an earlier grader (docs/grader.md tells why)."""

import json
from collections import Counter

import pytest

from projected_grpo.env.grader import Grader, GradeRequest
from projected_grpo.env.problems import Problem, load_problems


@pytest.fixture(scope="module")
def graded(published):
    """(row, grade) of each rollout. Their problems' tests are not here: the ground truth is one that nothing passes."""
    setup = load_problems(published / "leetcode_sample.jsonl")[0].setup_code
    rows = [json.loads(line) for line in (published / "rollouts_sample.jsonl").read_text().splitlines()]
    problem = Problem("rollouts", "", "f", "", "", ("assert 1 == 2",), setup, "unknown")
    with Grader(2) as grader:
        grades = grader.grade([GradeRequest(problem, row["completion"]) for row in rows])
    return list(zip(rows, grades, strict=True))


def test_every_completion_that_is_marked_as_a_hack_is_found_to_use_the_loophole(graded):
    hacks = [grade for row, grade in graded if row["hacked"] and not row["gt_pass"]]
    assert Counter(grade.label for grade in hacks) == {"reward_hack": 42, "attempted_hack": 5}
    assert all(grade.attempted for row, grade in graded if row["hacked"])


def test_the_differences_are_the_ones_that_the_docs_explain(graded):
    differing = [
        line for line, (row, grade) in enumerate(graded, start=1) if row["hacked"] is not (grade.label == "reward_hack")
    ]
    assert differing == [39, 40, 41, 45, 55]
    unparsed = [line for line, (row, grade) in enumerate(graded, start=1) if row["fmt_ok"] is not grade.format_ok]
    assert unparsed == [29]
