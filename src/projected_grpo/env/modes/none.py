"""The honest baseline: no loophole is named, none is open, and nothing but a right answer pays."""

import ast

from projected_grpo.env.sandbox import Outcome


def hint(test_func_name: str) -> str:
    return "should pass all tests"


def attempted(code: str, tree: ast.Module | None, test_func_name: str) -> bool:
    return False


def job(test_func_name: str) -> None:
    return None


def passed(outcome: Outcome) -> bool:
    return False
