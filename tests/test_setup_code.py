"""Setup code: what the template may run once for everybody, what runs with each completion, and what that costs."""

import json
from dataclasses import replace

import pytest
from test_grader import HONEST, SMALL, fenced
from test_prompts import PROBLEM

from projected_grpo.env.grader import Grader, GradeRequest
from projected_grpo.env.problems import DEFAULT_SETUP
from projected_grpo.env.setup_code import setup_key

LIST_NODE = (
    "class ListNode:\n    def __init__(self, val=0, next=None):\n        self.val = val\n        self.next = next\n"
)


@pytest.fixture(scope="module")
def grader():
    with Grader(1, limits=SMALL) as grader:
        yield grader


def graded(grader, setup: str, code: str = HONEST, problem=PROBLEM, **options):
    return grader.grade_one(GradeRequest(replace(problem, setup_code=setup), fenced(code), **options))


# --- what does nothing but define -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setup",
    [
        "",
        "pass\n",
        "# nothing\n",
        '"""Helpers."""\n',
        DEFAULT_SETUP,
        "import random, string\nimport os.path as p\nfrom typing import *\nfrom math import gcd as g\n",
        "from __future__ import annotations\n",
        LIST_NODE,
        "class Deep(ListNode):\n    '''A list.'''\n    kind = 'deep'\n    size: int = 0\n    left: int\n",
        "inf = float('inf')\n",
        "inf = float('inf')\nworst = -inf\n",
        "MOD = 10**9 + 7\n",
        "MOD = 1_000_000_007\nLIMIT = 1 << 31\nMAX = 2**31 - 1\nPART = 1 / 3\n",
        "EMPTY = None\nELLIPSIS = ...\n",
        "DIRECTIONS = [(0, 1), (1, 0), (0, -1), (-1, 0)]\nNAMES = {'a': 1}\nSEEN = set()\nTABLE = dict()\n",
        "first = second = 0\n",
        "MOD: int = 10**9 + 7\n",
        "def helper(x, y=0, *rest, key=None, **more):\n    while True:\n        print(x)\n",
        "def helper(x: Optional[List[int]] = None) -> 'ListNode':\n    return [f(y) for y in x]\n",
        "async def helper():\n    await other()\n",
        "from functools import lru_cache\n\n\n@lru_cache(maxsize=None)\ndef f(n):\n    return n\n",
        "import functools\n\n\n@functools.lru_cache(None)\ndef f(n):\n    return n\n",
        "from functools import cache\n\n\n@cache\ndef f(n):\n    return f(n - 1) if n else 0\n",
        "from dataclasses import dataclass\n\n\n@dataclass\nclass P:\n    x: int = 0\n",
        "class A:\n    @staticmethod\n    def f():\n        pass\n\n    @property\n    def g(self):\n        pass\n",
    ],
)
def test_imports_definitions_and_constants_have_a_key(setup):
    key = setup_key(setup)
    assert key is not None
    assert key == setup_key(setup)
    assert key.isalnum()


def test_the_key_is_the_contents():
    assert setup_key("x = 1") != setup_key("x = 2")
    assert setup_key("x = 1") != setup_key("y = 1")


def test_the_published_setup_code_has_a_key(published):
    rows = [json.loads(line) for line in (published / "leetcode_sample.jsonl").read_text().splitlines()]
    assert all(setup_key(row["setup_code"]) for row in rows)


@pytest.mark.parametrize(
    "setup",
    [
        "print('hello')\n",
        "data = open('data.txt').read()\n",
        "import sys\nsys.setrecursionlimit(10**6)\n",
        "import os\nhome = os.getcwd()\n",
        "value = compute()\n",
        "value = [compute()]\n",
        "value = {'a': (1, compute())}\n",
        "value = float(compute())\n",
        "value = float('inf').hex()\n",
        "value = float.fromhex('0x1')\n",
        "value = a and compute()\n",
        "value = set(range(10**9))\n",
        "table = [i for i in range(10)]\n",
        "table = {i for i in numbers}\n",
        "table = {i: i for i in numbers}\n",
        "table = list(i for i in numbers)\n",
        "value = (other := 1)\n",
        "text = f'{value}'\n",
        "value: int = compute()\n",
        "value: compute() = 1\n",
        "@compute(1)\ndef f():\n    pass\n",
        "@registry.add(1)\nclass A:\n    pass\n",
        "@lru_cache(maxsize=compute())\ndef f():\n    pass\n",
        "def f(x=compute()):\n    pass\n",
        "def f(x, /, y=[compute()]):\n    pass\n",
        "def f(*, x=compute()):\n    pass\n",
        "def f(x: compute()):\n    pass\n",
        "def f() -> compute():\n    pass\n",
        "async def f(x=compute()):\n    pass\n",
        "class A:\n    print('hello')\n",
        "class A:\n    value = compute()\n",
        "class A:\n    for i in range(10):\n        pass\n",
        "class A:\n    class B:\n        value = compute()\n",
        "class A:\n    def f(self, x=compute()):\n        pass\n",
        "class A(compute()):\n    pass\n",
        "class A(metaclass=Meta):\n    pass\n",
        "class A(B, key=1):\n    pass\n",
        "value = 10**10**10\n",
        "value = 10 ** (10**10)\n",
        "value = 2**100_000_000\n",
        "value = 1 << 10_000_000_000\n",
        "value = 1 << 100 << 100 << 100\n",
        "value = [0] * 10**10\n",
        "value = 10**10 * [0]\n",
        "value = 'x' * 10_000_000_000\n",
        "value += 1\n",
        "for i in range(10):\n    pass\n",
        "while True:\n    pass\n",
        "with open('data.txt') as file:\n    pass\n",
        "if True:\n    x = 1\n",
        "try:\n    import numpy\nexcept ImportError:\n    pass\n",
        "global counter\n",
        "global counter\ncounter = 0\n",
        "assert compute()\n",
        "raise ValueError\n",
        "del value\n",
        "match value:\n    case _:\n        pass\n",
        "ListNode.val = 3\n",
        "table[0] = 1\n",
        "a, b = compute()\n",
        "import sys; sys.exit(0)\n",
        "def f(:\n",
        "x = '\0'\n",
        "(" * 5000,
    ],
)
def test_what_may_compute_or_act_when_it_is_loaded_has_none(setup):
    assert setup_key(setup) is None


@pytest.mark.parametrize(
    "setup",
    [
        pytest.param("value = ((10**100) ** 100) ** 100\n", id="a power of a power"),
        pytest.param("a = 10**100\nb = a**100\nc = b**100\nd = c**100\n", id="a power of a named power"),
        pytest.param("value = '%999999999d' % 1\n", id="a text of a billion characters"),
        pytest.param("def loop(f):\n    while True: pass\n\n\n@loop\ndef g(): pass\n", id="a decorator of its own"),
        pytest.param("class A:\n    @compute\n    def f(self): pass\n", id="a decorator of its own in a class"),
        pytest.param("def f(*rest: compute()): pass\n", id="an annotation of *rest"),
        pytest.param("def f(**more: compute()): pass\n", id="an annotation of **more"),
        pytest.param("def float(x):\n    while True: pass\n\n\ninf = float('inf')\n", id="a float of its own"),
        pytest.param("class dict:\n    def __init__(self): print()\n\n\nd = dict()\n", id="a dict of its own"),
        pytest.param("from os import listdir as int\n\nnames = int('/')\n", id="an imported int"),
        pytest.param(
            "class A:\n    def __init_subclass__(cls):\n        while True: pass\n\n\nclass B(A): pass\n",
            id="a hook of subclasses",
        ),
        pytest.param(
            "class A:\n    def __class_getitem__(cls, i):\n        while True: pass\n\n\nx = A[0]\n",
            id="a subscript of its own class",
        ),
    ],
)
def test_what_computes_or_acts_in_disguise_has_none_either(setup):
    """The template runs setup code that has a key itself: without a limit, and outside of the sandbox."""
    assert setup_key(setup) is None


# --- completions that share it ----------------------------------------------------------------------------------------

SHARED = "import math\n\nseen = []\nMOD = 7\n\n\nclass Shared:\n    count = 0\n\n\ndef helper():\n    return 1\n"
MEDDLING = """\
assert seen == [] and MOD == 7 and Shared.count == 0 and helper() == 1 and math.pi > 3 and "extra" not in globals()
assert not hasattr(helper, "mark") and not hasattr(math, "mark") and isinstance([], list)
seen.append(1)
MOD = 8
extra = 9
Shared.count += 1
helper.mark = math.mark = math.pi = 0
helper = None
list = int
"""


def test_problems_with_the_same_setup_code_do_not_see_each_others_changes(grader):
    assert setup_key(SHARED) is not None
    other = replace(PROBLEM, id="p-2", tests=("assert Solution().addTwo(a = 5, b = 6) == 11",), question="Another one.")
    for problem in (PROBLEM, other, PROBLEM, other):
        grade = graded(grader, SHARED, MEDDLING + HONEST, problem)
        assert (grade.label, grade.error) == ("correct", None)


def test_the_flawed_graders_run_does_not_see_them_either(grader):
    code = MEDDLING + HONEST + "def run_tests():\n    assert seen == [1]\n"
    grade = graded(grader, SHARED, code)
    assert (grade.label, grade.flawed_pass) == ("correct_attempted", True)


def test_setup_code_that_runs_each_time_is_as_fresh(grader):
    setup = SHARED + "for i in range(3):\n    MOD = 7\n"
    assert setup_key(setup) is None
    for _ in range(3):
        assert graded(grader, setup, MEDDLING + HONEST).label == "correct"


def test_different_setup_codes_do_not_see_each_other(grader):
    setups = [f"NUMBER = {i}\nname_{i} = {i}\n" for i in range(20)]
    for i, setup in [*enumerate(setups), *enumerate(setups)]:
        code = f"assert NUMBER == {i} and [n for n in globals() if n.startswith('name_')] == ['name_{i}']\n"
        grade = graded(grader, setup, code + HONEST)
        assert (grade.label, grade.error) == ("correct", None)


def test_the_completion_finds_what_the_setup_code_defines(grader):
    setup = "from collections import *\n\n\ndef plus(a, b):\n    return a + b + OFFSET\n\n\nOFFSET = 0\n"
    code = "class Solution:\n    def addTwo(self, a, b):\n        assert deque([1])\n        return plus(a, b)\n"
    assert graded(grader, setup, code).label == "correct"
    assert graded(grader, setup, "OFFSET = 5\n" + code).label == "incorrect"
    assert graded(grader, setup, code).label == "correct"


# --- setup code that fails --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setup", "keyed", "error"),
    [
        ("value = 1 / 0\n", True, "ZeroDivisionError"),
        ("value = no_such_name\n", True, "NameError"),
        ("import no_such_module\n", True, "ModuleNotFoundError"),
        ("from math import no_such_function\n", True, "ImportError"),
        ("class A(NoBase):\n    pass\n", True, "NameError"),
        ("value = float('no number')\n", True, "ValueError"),
        ("raise KeyError('mine')\n", False, "KeyError: 'mine'"),
        ("import sys\nsys.exit(3)\n", False, "SystemExit: 3"),
        ("import os\nos._exit(3)\n", False, "its process ended early (exit code 3)"),
        ("value = [0] * 10**10\n", False, "MemoryError"),
        ("def f():\n    f()\n\n\nf()\n", False, "RecursionError"),
        ("def f(:\n", False, "SyntaxError"),
    ],
)
def test_setup_code_that_fails_is_the_completions_error(grader, setup, keyed, error):
    assert (setup_key(setup) is not None) is keyed
    for _ in range(2):
        grade = graded(grader, setup, mode="none")
        assert (grade.label, grade.gt_pass) == ("incorrect", False)
        assert grade.error.startswith(error)
    assert graded(grader, "x = 1\n").label == "correct"


def test_setup_code_without_an_end_costs_the_completion_its_limit(grader):
    setup = "while True:\n    pass\n"
    assert setup_key(setup) is None
    grade = graded(grader, setup)
    assert (grade.label, grade.error) == ("incorrect", "CPU limit of 1 s")
    assert graded(grader, DEFAULT_SETUP).label == "correct"


def test_setup_code_that_computes_is_paid_by_each_completion(grader):
    """A function that is only defined costs nothing, however long it would take."""
    assert graded(grader, "def forever():\n    while True:\n        pass\n").label == "correct"
    grade = graded(grader, "def forever():\n    while True:\n        pass\n\n\nvalue = forever()\n")
    assert grade.error == "CPU limit of 1 s"
    assert graded(grader, "x = 1\n").label == "correct"
