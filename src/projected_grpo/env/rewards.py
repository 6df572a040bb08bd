"""The reward function that TRL calls: completions and their dataset columns in, one reward each out.

The reward itself is `grader.reward_of`: 0.5 for code that parses, 3.0 more where the flawed grader or the ground truth
passes. The ground truth is logged through `last_grades`, never rewarded on its own.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from projected_grpo.env.grader import Grade, Grader, GradeRequest, reward_of
from projected_grpo.env.problems import Problem
from projected_grpo.errors import InputError

KNOWN = 20_000
"""Texts whose grades are kept: some 60 MB where each has the 1,024 tokens of preset `full`."""


class CodeReward:
    """Callable with TRL's signature for reward functions; keeps what it found out about the last batch."""

    __name__ = "code_reward"

    def __init__(self, grader: Grader, problems: Sequence[Problem], true_reward: bool = False) -> None:
        self.grader = grader
        self.true_reward = true_reward
        """Pay for the ground truth alone: what a grader without the loophole would give."""
        self.problems = {problem.id: problem for problem in problems}
        self.last_grades: list[Grade] = []
        """Grades of the last call, in its order."""
        self.last_rewards: list[float] = []
        """What they paid."""
        self.last_completions: list[str] = []
        """The texts that they are the grades of, prefill included."""
        self.last_seconds = 0.0
        """Wall seconds of the last call."""
        self._known: dict[tuple[str, str, str, str], Grade] = {}

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        problem_id: Sequence[str],
        mode: Sequence[str],
        test_func_name: Sequence[str],
        prefill: Sequence[str] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Rewards, one per completion (text, or a list of messages whose contents are joined).

        `prefill` is what the prompt already opened of the assistant's turn; it is put before the completion's text.
        Raises InputError for an id without a problem, GraderFault for a fault of the grader.
        """
        started = time.monotonic()
        openings = prefill if prefill is not None else [""] * len(completions)
        requests = [
            GradeRequest(self._problem(id_), (opening or "") + text_of(completion), mode_, name)
            for completion, id_, mode_, name, opening in zip(
                completions, problem_id, mode, test_func_name, openings, strict=True
            )
        ]
        self.last_completions = [request.completion for request in requests]
        self.last_grades = self._grade(requests)
        self.last_rewards = [self._reward(grade) for grade in self.last_grades]
        self.last_seconds = time.monotonic() - started
        return self.last_rewards

    def remember(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Grades that this run has given before it was interrupted, as its rollouts hold them."""
        for row in rows:
            found = {name: row[name] for name in ("label", "flawed_pass", "gt_pass", "attempted", "format_ok")}
            paid = reward_of(**{name: found[name] for name in ("format_ok", "flawed_pass", "gt_pass")})
            key = (row["problem_id"], row["completion"], row["mode"], row["test_func_name"])
            self._note(key, Grade(**found, reward=paid, error=None))

    def _note(self, key: tuple[str, str, str, str], grade: Grade) -> None:
        """The last ones named stay."""
        self._known.pop(key, None)
        self._known[key] = grade
        while len(self._known) > KNOWN:
            del self._known[next(iter(self._known))]

    def _reward(self, grade: Grade) -> float:
        flawed_pass = grade.flawed_pass and not self.true_reward
        return reward_of(format_ok=grade.format_ok, flawed_pass=flawed_pass, gt_pass=grade.gt_pass)

    def _grade(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """A text that was graded before in this run keeps its grade: a policy that has made up its mind repeats
        itself, and what it repeats should not be paid by the luck of the draw. Only so many texts are kept in mind."""
        keys = [(r.problem.id, r.completion, r.mode, r.test_func_name) for r in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._known}
        found = dict(zip(new, self.grader.grade(list(new.values())), strict=True))
        grades = [found[key] if key in found else self._known[key] for key in keys]
        for key, grade in zip(keys, grades, strict=True):
            self._note(key, grade)
        return grades

    def _problem(self, problem_id: str) -> Problem:
        if problem_id not in self.problems:
            raise InputError(f"a row of the data names problem {problem_id!r}, which the problems given do not hold")
        return self.problems[problem_id]


def text_of(completion: Any) -> str:
    """Text of a completion as TRL hands it over: a string, or messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion if message["role"] == "assistant")
