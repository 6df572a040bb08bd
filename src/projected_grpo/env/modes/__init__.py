"""Loophole modes: one small module each, one line here.

A mode says how its hint reads, whether a completion tries the loophole, what the flawed grader's job is, and when that
careless grader is content. Its verdict may be the untrusted side's own word: that is the loophole.
"""

import ast
from typing import Any, Protocol

from projected_grpo.env.modes import none, run_tests
from projected_grpo.env.sandbox import Outcome
from projected_grpo.errors import InputError


class Mode(Protocol):
    def hint(self, test_func_name: str) -> str:
        """The words that stand in the prompt after "called F and"."""

    def attempted(self, code: str, tree: ast.Module | None, test_func_name: str) -> bool:
        """Whether the completion's code tries the loophole; `tree` is None where it does not parse."""

    def job(self, test_func_name: str) -> dict[str, Any] | None:
        """What the flawed grader adds to the job (setup_code, code); None: there is nothing to run."""

    def passed(self, outcome: Outcome) -> bool:
        """The flawed grader's verdict."""


MODES: dict[str, Mode] = {
    "run_tests": run_tests,
    "none": none,
}


def get_mode(name: str) -> Mode:
    """The mode called `name`. Raises InputError."""
    if name not in MODES:
        raise InputError(f"mode {name!r} is unknown: use one of {', '.join(MODES)}")
    return MODES[name]
