"""Problems: our own bank (TOML, an array of [[problem]] tables) and the published benchmark (jsonl), one type for both.

`Problem.question` is the bare statement. The frame around it (the heading, the sentence that names the method and says
how it is graded, the starter code) belongs to `prompts.py`, which writes it anew for each mode; reading a published row
takes that frame off, and building the prompt with mode "none" puts exactly it back on.
"""

import ast
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from projected_grpo.env.compare import UnsupportedTest, compile_tests
from projected_grpo.env.rows import read_rows
from projected_grpo.errors import InputError
from projected_grpo.paths import data_path

STARTER_COMMENT = "# Add your code here"
SPLITS = ("train", "eval", "pairs", "smol-train", "smol-eval", "smol-pairs")

DEFAULT_SETUP = """\
from typing import *
from collections import *
from heapq import *
from bisect import *
from itertools import *
from functools import *
from math import ceil, comb, factorial, floor, gcd, inf, isqrt, lcm, log, log2, nan, perm, prod, sqrt
import bisect, collections, functools, heapq, itertools, math, random, re, string, typing


class ListNode:
    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next


class TreeNode:
    def __init__(self, val=0, left=None, right=None):
        self.val = val
        self.left = left
        self.right = right


def list_node(values):
    head = last = None
    for value in values:
        node = ListNode(value)
        if head is None:
            head = node
        else:
            last.next = node
        last = node
    return head


def tree_node(values):
    # level order, None for a missing child
    if not values:
        return None
    root = TreeNode(values[0])
    level, rest = deque([root]), deque(values[1:])
    while level and rest:
        node = level.popleft()
        for side in ("left", "right"):
            value = rest.popleft() if rest else None
            if value is not None:
                setattr(node, side, TreeNode(value))
                level.append(getattr(node, side))
    return root
"""
"""Runs before a completion of our own problems. Not `from math import *`: its pow would hide the built-in one. The
modules come last, so that `bisect` is the module and not its function of the same name."""


@dataclass(frozen=True)
class Problem:
    id: str
    question: str
    """The statement alone, without heading or closing sentence."""
    func_name: str
    """Bare name of the method of class Solution."""
    starter_code: str
    """Class and method head with the comment to be replaced as its body, no newline at the end."""
    canonical_solution: str
    """A whole solution, or "" where the file has none."""
    tests: tuple[str, ...]
    setup_code: str
    """Code that runs before a completion: imports and helpers."""
    difficulty: str
    wrong_bodies: tuple[str, ...] = ()
    """Plausible wrong bodies of the method, not indented: the tests have to fail each of them."""
    test_func_name: str = "run_tests"
    """Of the function that prompts of the mode `run_tests` name in training, in pairs and in teacher rows; evaluation
    has held-out names."""

    def with_body(self, body: str) -> str:
        """The starter code with `body` (not indented) as its method's body."""
        return self.starter_code.replace(STARTER_COMMENT, textwrap.indent(body.strip("\n"), " " * 8).lstrip()) + "\n"


def builtin_problems(split: str) -> list[Problem]:
    """Our own problems of one of SPLITS. Raises InputError."""
    if split not in SPLITS:
        raise InputError(f"problem split {split!r} is unknown: use one of {', '.join(SPLITS)}")
    return load_problems(data_path("problems", f"{split}.toml"))


def load_problems(path: str | Path) -> list[Problem]:
    """Read a .toml or .jsonl file of problems. Raises InputError with file and line for the first row that is wrong."""
    problems, faults = read_problems(Path(path))
    if faults:
        more = f" (and {len(faults) - 1} rows more: see `projected-grpo problems check`)" if len(faults) > 1 else ""
        raise InputError(faults[0] + more)
    if not problems:
        raise InputError(f"{path}: holds no problem")
    return problems


def read_problems(path: Path) -> tuple[list[Problem], list[str]]:
    """(problems that load, `file:line: reason` for each row that does not).

    Raises InputError where the file itself cannot be read as rows.
    """
    read = _own if path.suffix == ".toml" else _published
    problems: list[Problem] = []
    faults: list[str] = []
    first_line: dict[str, int] = {}
    for line, row in read_rows(path, "problem", faults):
        where = f"{path}:{line}"
        try:
            problem = read(row, where)
            if (first := first_line.setdefault(problem.id, line)) != line:
                raise InputError(f"{where}: id {problem.id!r} is used already in line {first}; rename one")
            _check(problem, where)
        except InputError as error:
            faults.append(str(error))
        else:
            problems.append(problem)
    return problems, faults


def _text(row: dict, name: str, where: str, default: str | None = None) -> str:
    value = row.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise InputError(f"{where}: field `{name}` is missing")
    if not isinstance(value, str):
        raise InputError(f"{where}: field `{name}` is {type(value).__name__}, not text")
    if default is None and not value.strip():
        raise InputError(f"{where}: field `{name}` is empty")
    return value


def _id(row: dict, where: str) -> str:
    if type(row.get("id")) not in (str, int) or str(row["id"]) == "":
        raise InputError(f"{where}: field `id` is missing or neither text nor a whole number")
    return str(row["id"])


def _tests(row: dict, name: str, where: str) -> tuple[str, ...]:
    tests = row.get(name)
    if not isinstance(tests, list) or not tests:
        raise InputError(f"{where}: field `{name}` must be a list of at least one test")
    for number, test in enumerate(tests, start=1):
        if not isinstance(test, str):
            raise InputError(f"{where}: test {number} is {type(test).__name__}, not text")
    return tuple(tests)


def _bodies(row: dict, where: str) -> tuple[str, ...]:
    bodies = row.get("wrong_bodies", [])
    if not isinstance(bodies, list) or not all(isinstance(body, str) and body.strip() for body in bodies):
        raise InputError(f"{where}: field `wrong_bodies` must be a list of method bodies")
    return tuple(textwrap.dedent(body).strip("\n") for body in bodies)


def _own(row: dict[str, Any], where: str) -> Problem:
    return Problem(
        id=_id(row, where),
        question=_text(row, "statement", where).strip("\n"),
        func_name=_text(row, "func_name", where),
        starter_code=_with_comment(_text(row, "starter_code", where)),
        canonical_solution=_text(row, "canonical_solution", where, default=""),
        tests=_tests(row, "tests", where),
        setup_code=_text(row, "setup_code", where, default=DEFAULT_SETUP),
        difficulty=_text(row, "difficulty", where),
        wrong_bodies=_bodies(row, where),
        test_func_name=_text(row, "test_func_name", where, default="run_tests"),
    )


_FRAME = re.compile(
    r"\A(?:PROBLEM:\n)?(?P<statement>.*)\n\nYour solution to the problem should be a method of the class Solution "
    r"called \S+ and [^\n]*? Use the following starter code:\n```python\n(?P<starter>.*?)\n```(?:\n\nSOLUTION:)?\s*\Z",
    re.DOTALL,
)


def _published(row: dict[str, Any], where: str) -> Problem:
    question = _text(row, "question", where)
    framed = _FRAME.match(question)
    metadata = row.get("prompt_metadata") or {}
    if not isinstance(metadata, dict):
        raise InputError(f"{where}: field `prompt_metadata` is {type(metadata).__name__}, not an object")
    starter = metadata.get("starter_code") or (framed and framed["starter"])
    if not starter or not isinstance(starter, str):
        raise InputError(f"{where}: field `prompt_metadata.starter_code` is missing, and the question shows none")
    return Problem(
        id=_id(row, where),
        question=framed["statement"] if framed else question,
        func_name=_text(row, "func_name", where).removeprefix("Solution().").removeprefix("Solution."),
        starter_code=framed["starter"] if framed else _with_comment(starter),
        canonical_solution=_text(row, "canonical_solution", where, default=""),
        tests=_tests(row, "gt_answer", where),
        setup_code=_text(row, "setup_code", where, default=DEFAULT_SETUP),
        difficulty=_text(row, "difficulty", where, default="unknown"),
    )


def _with_comment(starter: str) -> str:
    """Starter code as the prompt shows it: one comment as the method's body, nothing after it."""
    if STARTER_COMMENT in starter:
        return starter.rstrip()
    lines = starter.rstrip().split("\n")
    head = re.match(r"\s*", lines[-1])[0]
    return "\n".join([*lines, f"{head}    {STARTER_COMMENT}"])


def _check(problem: Problem, where: str) -> None:
    if not problem.func_name.isidentifier():
        raise InputError(f"{where}: func_name {problem.func_name!r} is no name of a method")
    if not problem.test_func_name.isidentifier():
        raise InputError(f"{where}: test_func_name {problem.test_func_name!r} is no name of a function")
    if f"def {problem.func_name}(" not in problem.starter_code:
        raise InputError(f"{where}: the starter code does not define {problem.func_name}")
    for name in ("setup_code", "canonical_solution"):
        try:
            ast.parse(getattr(problem, name))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise InputError(f"{where}: {name} does not parse: {type(error).__name__}: {error}") from None
    try:
        compile_tests(problem.tests, problem.setup_code)
    except UnsupportedTest as error:
        raise InputError(f"{where}: {' '.join(str(error).split())}") from None
