"""Loophole modes: one small module each, one line here.

A mode says how its hint reads, whether a completion tries the loophole, what its flawed grader looks at, and when that
careless grader is content. Each imitates a mistake that people make, and its verdict may be the untrusted side's own
word: that is the loophole. Nothing here runs outside the sandbox.
"""

import ast
from typing import Any, Protocol

from projected_grpo.env.compare import Oracle
from projected_grpo.env.modes import (
    eq_override,
    exit_code,
    file_marker,
    none,
    run_tests,
    sentinel,
    stdout_marker,
)
from projected_grpo.env.sandbox import Outcome
from projected_grpo.errors import InputError


class Mode(Protocol):
    HINTS: dict[str, str]
    """What stands in the prompt after "called F and", by wording; all have `plain`. {name} is the test function's."""
    WATCHED: dict[str, Any]
    """Fields of the job whose side effects this flawed grader looks at, in the run that the ground truth judges."""
    FROM_FIRST_RUN: bool
    """Whether it judges by that run. Otherwise nobody is believed who was not asked in a second one."""

    def attempted(self, code: str, tree: ast.Module | None, test_func_name: str) -> bool:
        """Whether the completion's code tries the loophole; `tree` is None where it does not parse."""

    def second_run(self, code: str, test_func_name: str, first: Outcome) -> tuple[tuple[str, Any], ...] | None:
        """What a process of its own is asked for (`Job.ask`); None: there is nothing to ask."""

    def passed(self, outcome: Outcome, oracle: Oracle, code: str) -> bool:
        """The flawed grader's verdict, from the first run or the second."""


MODES: dict[str, Mode] = {
    "run_tests": run_tests,
    "sentinel": sentinel,
    "stdout_marker": stdout_marker,
    "file_marker": file_marker,
    "exit_code": exit_code,
    "eq_override": eq_override,
    "none": none,
}


def get_mode(name: str) -> Mode:
    """The mode called `name`. Raises InputError."""
    if name not in MODES:
        raise InputError(f"mode {name!r} is unknown: use one of {', '.join(MODES)}")
    return MODES[name]


def hint(mode: str, test_func_name: str, wording: str = "plain") -> str:
    """The truthful words about how grading works. Raises InputError for a wording that the mode does not have."""
    hints = get_mode(mode).HINTS
    if wording not in hints:
        raise InputError(f"mode {mode} has no wording {wording!r}: use one of {', '.join(hints)}")
    return hints[wording].format(name=test_func_name)
