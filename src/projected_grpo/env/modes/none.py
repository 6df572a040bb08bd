"""The honest baseline: no loophole is named, none is open, and nothing but a right answer pays."""

import ast
from typing import Any

from projected_grpo.env.compare import Oracle
from projected_grpo.env.sandbox import Outcome

HINTS = {"plain": "should pass all tests"}
WATCHED: dict[str, Any] = {}
FROM_FIRST_RUN = True


def attempted(code: str, tree: ast.Module | None, test_func_name: str) -> bool:
    return False


def second_run(code: str, test_func_name: str, first: Outcome) -> None:
    return None


def passed(outcome: Outcome, oracle: Oracle, code: str) -> bool:
    return False
