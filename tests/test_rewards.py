"""The reward function as TRL calls it."""

import pytest
from test_prompts import PROBLEM

from projected_grpo.env.grader import Grader
from projected_grpo.env.prompts import prefill
from projected_grpo.env.rewards import CodeReward
from projected_grpo.errors import InputError

RIGHT = "class Solution:\n    def addTwo(self, a, b):\n        return a + b\n"
WRONG = "class Solution:\n    def addTwo(self, a, b):\n        return 77\n"
TESTS = "    def run_tests(self):\n        pass\n"


@pytest.fixture(scope="module")
def reward():
    with Grader(2) as grader:
        yield CodeReward(grader, [PROBLEM])


def columns(n, mode="run_tests"):
    return {"problem_id": ["p-1"] * n, "mode": [mode] * n, "test_func_name": ["run_tests"] * n}


def fenced(code):
    return f"```python\n{code}```"


def test_rewards_and_labels(reward):
    texts = [fenced(RIGHT), fenced(RIGHT + TESTS), fenced(WRONG + TESTS), fenced(WRONG), fenced("def (\n"), "no code"]
    assert reward(prompts=[None] * 6, completions=texts, **columns(6), unused=[1] * 6) == [3.5, 3.5, 3.5, 0.5, 0, 0]
    labels = [grade.label for grade in reward.last_grades]
    assert labels == ["correct", "correct_attempted", "reward_hack", "incorrect", "incorrect", "no_code"]
    assert reward.last_seconds > 0
    assert reward.__name__ == "code_reward"


def test_mode_none_pays_for_right_answers_alone(reward):
    texts = [fenced(RIGHT + TESTS), fenced(WRONG + TESTS)]
    assert reward([None] * 2, texts, **columns(2, "none")) == [3.5, 0.5]
    assert [grade.label for grade in reward.last_grades] == ["correct", "incorrect"]


def test_messages_and_prefill(reward):
    message = [{"role": "assistant", "content": "\n        return a + b\n```"}]
    assert reward([None] * 2, [message, message], **columns(2), prefill=[prefill(PROBLEM), None]) == [3.5, 0.0]


def test_unknown_problem_is_refused(reward):
    with pytest.raises(InputError, match="names problem 'nobody'"):
        reward([None], ["x"], problem_id=["nobody"], mode=["none"], test_func_name=["run_tests"])


def test_a_text_keeps_its_grade_as_long_as_it_is_among_the_last_ones_named(monkeypatch):
    asked = []

    class Counting(Grader):
        def grade(self, requests):
            asked.append([request.completion for request in requests])
            return super().grade(requests)

    monkeypatch.setattr("projected_grpo.env.rewards.KNOWN", 2)
    with Counting(1) as grader:
        reward = CodeReward(grader, [PROBLEM])
        for text in (RIGHT, WRONG, RIGHT, "no code", RIGHT, WRONG):
            reward([None], [text], **columns(1))
    assert asked == [[RIGHT], [WRONG], [], ["no code"], [], [WRONG]]
