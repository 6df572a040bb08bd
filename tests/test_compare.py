"""The trusted comparison: strict equality, the wire format, and tests as small programs."""

import collections
import copy
import json
import math
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from projected_grpo.env import plain
from projected_grpo.env.compare import Oracle, UnsupportedTest
from projected_grpo.env.sandbox import TEMPLATE

plain_keys = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4))
plain_values = st.recursive(
    st.one_of(plain_keys, st.floats(allow_nan=False), st.binary(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(plain_keys, inner, max_size=4),
        st.sets(plain_keys, max_size=4),
    ),
    max_leaves=12,
)


def passes(test: str, *results, after=()):
    """Whether one test holds for the values that its calls returned; `after`: the arguments then, of the first call."""
    oracle = Oracle((test,))
    if not oracle.has_dialogue:
        return oracle.judge(results) is None
    given = iter(results)
    afterwards = iter(after)

    def ask(method, instance, args, named):
        for argument, now in zip([*args, *named.values()], afterwards, strict=False):
            plain.update(argument, copy.deepcopy(now))
        return copy.deepcopy(next(given))

    held = oracle.examine(ask) is None
    assert not held or next(given, None) is None
    return held


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (1, True, False),
        (0, False, False),
        ([1], [True], False),
        ({1: 2}, {True: 2}, False),
        ({1}, {True}, False),
        ({(1, True)}, {(1, 1)}, False),
        (2, 2.0, True),
        ([2, 3], [2.0, 3], True),
        ((1, 2), [1, 2], False),
        (math.nan, math.nan, False),
        ({1, 2}, frozenset({1, 2}), True),
        ("a", b"a", False),
        (None, 0, False),
        (2**53 + 1, float(2**53), False),
        (plain.Opaque("Always"), plain.Opaque("Always"), False),
        ([1, [2, (3,)]], [1, [2, (3,)]], True),
        ({"a": [1]}, {"a": [1.0]}, True),
    ],
)
def test_strict_equality(left, right, equal):
    assert plain.strict_equal(left, right) is equal
    assert plain.strict_equal(right, left) is equal


def test_subclasses_are_equal_to_nothing():
    class MyList(list):
        pass

    class MyStr(str):
        pass

    class Always:
        def __eq__(self, other):
            return True

        __hash__ = None

    assert not plain.strict_equal(MyList([1]), [1])
    assert not plain.strict_equal(MyStr("a"), "a")
    assert not plain.strict_equal(Always(), 3)


@settings(max_examples=150, deadline=None)
@given(plain_values)
def test_wire_format_round_trips(value):
    text = json.dumps(plain.encode(value))
    back = plain.Decoder().decode(plain.loads(text))
    assert plain.strict_equal(back, value)


def test_not_a_number_round_trips():
    assert math.isnan(plain.Decoder().decode(plain.loads(json.dumps(plain.encode(math.nan)))))


def test_worker_encoder_mirrors_ours():
    values = "[[1, 2.5, True, None, 'x', (1,), {2}, {'a': [3]}, b'z', 1j, float('inf'), 10**5000, frozenset()]]"
    script = (
        "import importlib.util, json, sys\n"
        f"spec = importlib.util.spec_from_file_location('worker', {str(TEMPLATE.with_name('wire.py'))!r})\n"
        "worker = importlib.util.module_from_spec(spec); spec.loader.exec_module(worker)\n"
        f"values = {values}\n"
        "print(json.dumps(worker.Encoder().encode(values)))\n"
        "class Sub(list): pass\n"
        "back = worker.decode(worker.Encoder().encode(values), {})\n"
        "print(json.dumps([worker.Encoder().encode(Sub()), back == values]))"
    )
    ours, opaque = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.splitlines()
    assert json.loads(ours) == plain.encode(eval(values))
    assert json.loads(opaque) == [{"opaque": "Sub"}, True]


@pytest.mark.parametrize(
    "wire",
    [
        {"list": []},
        {"tuple": 3},
        {"a": 1, "b": 2},
        {"set": [[1]]},
        {"dict": [[1]]},
        {"float": "one"},
        {},
        {"int": "zz"},
    ],
)
def test_malformed_wire_values_are_refused(wire):
    with pytest.raises((ValueError, TypeError, KeyError)):
        plain.Decoder().decode(wire)


def test_deep_wire_values_are_refused():
    deep = 0
    for _ in range(300):
        deep = [deep]
    with pytest.raises(ValueError, match="deep"):
        plain.Decoder().decode(deep)


def test_plain_test_asks_one_call_and_keeps_the_expected_value():
    oracle = Oracle(("assert Solution().f(n = -7, x = [1, (2.5, None)]) == 424242",))
    assert oracle.calls == [["f", [], {"n": -7, "x": [1, {"tuple": [2.5, None]}]}]]
    assert "424242" not in str(oracle.calls)


@pytest.mark.parametrize(
    ("test", "right", "wrong"),
    [
        ("assert Solution().f(1) == 3", 3, 4),
        ("assert Solution().f(1) == True", True, 1),
        ("assert Solution().f(1) is True", True, 1),
        ("assert Solution().f(1) is None", None, 0),
        ("assert not Solution().f(1)", False, True),
        ("assert Solution().f(1)", [1], []),
        ("assert Solution().f(1) != 3", 4, 3),
        ("assert 3 == Solution().f(1)", 3, 5),
        ("assert abs(Solution().f(1) - 0.5) < 1e-6", 0.5000001, 0.51),
        ("assert math.isclose(Solution().f(1), 0.1, rel_tol=1e-3)", 0.10001, 0.2),
        ("assert round(Solution().f(1), 2) == 0.33", 1 / 3, 0.34),
        ("assert sorted(Solution().f(1)) == [1, 2]", [2, 1], [2, 2]),
        ("assert set(map(tuple, Solution().f(1))) == {(1, 2), (3, 4)}", [[3, 4], [1, 2]], [[1, 2]]),
        ("assert sorted(tuple(sorted(x)) for x in Solution().f(1)) == [(1, 2)]", [[2, 1]], [[2, 2]]),
        ("assert Counter(Solution().f(1)) == Counter([1, 1, 2])", [1, 2, 1], [1, 2]),
        ("assert list(Solution().f(1)) == [1, 2]", (1, 2), (2, 1)),
        ("assert Solution().f(1) in ([1], [2])", [2], [3]),
        ("assert len(Solution().f(1)) == 2 and 1 == 1", "ab", "a"),
        ("x = 2 * 10 ** 3\ny = Solution().f(x + 0)\nassert y[0] == x\nassert y[-1] == 'b'", [2000, "b"], [2000, "c"]),
        ("assert 1 <= Solution().f(1) < 3", 2, 3),
        ("assert Solution().f(1) == -inf", -math.inf, math.inf),
        ("assert is_same_list(Solution().f(list_node([1])), list_node([1, 2]))", plain.ListNode((1, 2)), None),
        ("assert is_same_tree(Solution().f(1), tree_node([1, None, 2]))", plain.TreeNode((1, None, 2)), 3),
        ("r = Solution().f(1)\nassert r is None or len(r) == 0", None, [1]),
        ("assert ''.join(sorted(Solution().f(1))) == 'ab'", "ba", "bb"),
    ],
)
def test_forms_of_tests(test, right, wrong):
    assert passes(test, right)
    assert not passes(test, wrong)
    assert not passes(test, plain.Opaque("Always"))


CHECKER = """
def check(order, edges):
    place = {}
    for i, node in enumerate(order):
        place[node] = i
    for a, b in edges:
        if place[a] > place[b]:
            return False
    return len(order) == 3
"""


@pytest.mark.parametrize(
    ("test", "right", "wrong"),
    [
        ("for n, want in [(1, 2), (5, 6)]:\n    assert Solution().f(n) == want", (2, 6), (2, 7)),
        ("assert all(Solution().f(n) == n * n for n in range(3))", (0, 1, 4), (0, 1, 5)),
        ("assert [Solution().f(a, b) for a in (1, 2) for b in (3,) if a + b > 4] == [9]", (9,), (8,)),
        ("s = Solution()\nassert s.g(s.f('ab')) == 'ab'", ("x", "ab"), ("x", "b")),
        (CHECKER + "assert check(Solution().f(3), [(0, 1), (1, 2)])", ([0, 1, 2],), ([1, 0, 2],)),
        ("def twice(n):\n    return Solution().f(n) + Solution().f(n + 1)\nassert twice(1) == 5", (2, 3), (2, 2)),
        (
            "n = 0\ntotal = 0\nwhile n < 3:\n    n += 1\n    total += Solution().f(n)\nassert total == 6",
            (1, 2, 3),
            (1, 2, 2),
        ),
        ("xs = []\nfor i in range(2):\n    xs.append(Solution().f(i))\nassert xs == [0, 1]", (0, 1), (1, 0)),
        (
            "r = Solution().f(1)\nseen = {}\nfor x in r:\n    seen[x] = seen.get(x, 0) + 1\nassert seen == {1: 2}",
            ([1, 1],),
            ([1],),
        ),
        ("r = Solution().f(1)\nif r > 0:\n    r -= 1\nassert r == 0", (1,), (2,)),
        ("assert {k: len(v) for k, v in Solution().f(1).items()} == {'a': 1}", ({"a": [2]},), ({"a": []},)),
        (
            "for i in range(5):\n    if i == 2: continue\n    if i > 3: break\n    assert Solution().f(i) == i",
            (0, 1, 3),
            (0, 1, 2),
        ),
        ("f = lambda x, y=1: x + y\nassert f(Solution().f(1)) == 3", (2,), (3,)),
        (
            "assert sorted(Solution().f(1), key=lambda p: p[1]) == [(2, 1), (1, 2)]",
            ([(1, 2), (2, 1)],),
            ([(1, 1), (2, 1)],),
        ),
        ("assert Solution().f(Solution().f(1) + 1) == 1", (0, 1), (0, 2)),
        ("assert all(Solution().f(i) == i for i in Solution().f(3))", ([0, 1], 0, 1), ([0, 1], 0, 0)),
        ("x = Solution().f(1)\nif x:\n    assert Solution().f(2) == 1", (True, 1), (True, 2)),
        ("xs = []\nxs.append(Solution().f(1))\nassert Solution().f(xs) == 1", (0, 1), (0, 2)),
        ("n = [1, 2]\nassert Solution().f(n) == 2\nassert Solution().f(n) == 2", (2, 2), (2, 3)),
        ("f = Solution().f\nassert list(map(f, [1, 2])) == [1, 4]", (1, 4), (1, 3)),
        ("def check(candidate):\n    assert candidate(2) == 4\ncheck(Solution().f)", (4,), (5,)),
        ("def trip(x):\n    s = Solution()\n    return s.g(s.f(x))\nassert trip(3) == 3", (9, 3), (9, 9)),
        ("a, b = Solution(), Solution()\nassert a.f(1) == b.f(1) == 1", (1, 1), (1, 2)),
        (
            "from math import pi\nfrom collections import Counter\nassert Counter(Solution().f(1)) == {1: 2} and pi",
            ([1, 1],),
            ([1],),
        ),
        ("r = Solution().f(1)\nr.sort(key=lambda p: -p)\nassert r == [2, 1], f'got {r}'", ([1, 2],), ([1, 3],)),
        ("for c in Solution().f(1):\n    assert ord(c) > 96", ("ab",), ("aB",)),
        (
            "g = [[0, 0], [0, 0]]\nfor i, j in Solution().f(1):\n    g[i][j] += 1\nassert g == [[1, 0], [0, 0]]",
            ([[0, 0]],),
            ([[1, 0]],),
        ),
        ("r = Solution().f(1)\nassert any(r[i] == 2 for i in range(9))", ([2],), ([1],)),
        ("def mk(k):\n    return lambda x: x + k\ng = mk(2)\nassert g(Solution().f(1)) == 3", (1,), (2,)),
        ("a, *b = Solution().f(1)\nassert [*b, a] == [2, 3, 1]", ([1, 2, 3],), ([1, 2],)),
        ("assert {**Solution().f(1), 'b': 2} == {'a': 1, 'b': 2}", ({"a": 1},), ({"a": 2},)),
        ("assert Solution().f(1).keys() == {'a'}", ({"a": 1},), ({"b": 1},)),
        ("assert list(Solution().f(1)) == [0, 1]", (range(2),), (range(3),)),
        ("assert list(Solution().f(1)) == [0, 1]", (collections.deque([0, 1]),), (collections.deque([1]),)),
    ],
)
def test_tests_as_small_programs(test, right, wrong):
    assert passes(test, *right)
    assert not passes(test, *wrong)


def test_functions_of_the_setup_code_keep_their_meaning():
    setup = "def close(a, b):\n    return abs(a - b) < 0.1\ndef other(x):\n    return x.y\n"
    oracle = Oracle(("assert close(Solution().f(1), 2)",), setup)
    assert oracle.judge([2.05]) is None
    assert oracle.judge([2.5]) == 1
    with pytest.raises(UnsupportedTest, match="uses the name `other`"):
        Oracle(("assert other(Solution().f(1))",), setup)


def test_a_checker_that_never_ends_does_not_hold():
    test = "r = Solution().f(1)\ndef spin(n):\n    while n > 0:\n        n += 1\n    return True\nassert spin(r)"
    assert passes(test, 0)
    assert not passes(test, 1)


@pytest.mark.parametrize("expected", [3, "a", [1, [None, True]], 2.5, (1,), {1: 2}])
def test_the_bytes_of_right_answers(expected):
    """Equal bytes pass without being parsed, so only values with one spelling are compared as bytes."""
    oracle = Oracle((f"assert Solution().f(1) == {expected!r}",))
    if isinstance(expected, (float, tuple, dict)):
        assert oracle.perfect is None
    else:
        line = json.dumps(["done", 0, expected], separators=(",", ":"))
        assert oracle.perfect == f'[["loaded"]]\n[{line}]\n'.encode()
    assert oracle.judge([expected]) is None


def test_in_place_result_is_the_argument_afterwards():
    test = "nums = [3, 1]\nSolution().f(nums)\nassert nums == [1, 3]"
    assert Oracle((test,)).has_dialogue
    assert passes(test, None, after=[[1, 3]])
    assert not passes(test, None, after=[[3, 1]])


@pytest.mark.parametrize(
    ("test", "calls"),
    [
        ("a = [2, 1]\nb = a\nSolution().f(a)\nassert b == [1, 2]", 1),
        ("c = {'in': [2, 1]}\nSolution().f(c['in'])\nassert c['in'] == [1, 2]", 1),
        ("data = [[2, 1], [4, 3]]\nfor d in data:\n    Solution().f(d)\nassert data == [[1, 2], [3, 4]]", 2),
        ("def go(a):\n    Solution().f(a)\nn = [2, 1]\ngo(n)\nassert n == [1, 2]", 1),
        ("n = list_node([2, 1])\nSolution().f(n)\nassert is_same_list(n, list_node([1, 2]))", 1),
    ],
)
def test_an_argument_that_is_changed_is_changed_under_all_its_names(test, calls):
    sort = Counter()

    def ask(method, instance, args, named):
        sort["asked"] += 1
        now = sorted(args[0] if isinstance(args[0], list) else args[0].values)
        plain.update(args[0], now if isinstance(args[0], list) else plain.ListNode(tuple(now)))

    assert Oracle((test,)).examine(ask) is None
    assert sort["asked"] == calls
    assert Oracle((test,)).examine(lambda *_: None) == 1


def test_an_argument_cannot_become_something_else():
    with pytest.raises(TypeError):
        plain.update([1], (1,))
    with pytest.raises(TypeError):
        plain.update([1], plain.Opaque("list"))


def test_several_calls_on_one_instance():
    test = "s = Solution()\nassert s.f(1) == 2\nassert s.f(2) == 3"
    asked = []
    Oracle((test,)).examine(lambda *call: asked.append(call) or call[2][0] + 1)
    assert asked == [("f", 0, [1], {}), ("f", 0, [2], {})]
    assert passes(test, 2, 3)
    assert not passes(test, 2, 2)


def test_every_assert_counts_and_a_missing_result_fails():
    oracle = Oracle(("assert Solution().f(1) == 1", "assert 2 == 2", "assert Solution().f(2) == 2"))
    assert oracle.judge([1, 2]) is None
    assert oracle.judge([1, 3]) == 3
    assert oracle.judge([1]) == 3
    assert Oracle(("assert 1 == 2",)).judge([]) == 1


@pytest.mark.parametrize(
    "test",
    [
        "assert Solution().f(",
        "import os\nassert Solution().f(1) == 1",
        "assert __import__('os').getcwd() == Solution().f(1)",
        "assert helper(Solution().f(1))",
        "assert open('x').read() == Solution().f(1)",
        "assert Solution().f(1).real.__class__ == 1",
        "def check(x):\n    return x.real\nassert check(Solution().f(1))",
        "def check(x):\n    import os\nassert check(Solution().f(1))",
        "def check(x):\n    return unknown(x)\nassert check(Solution().f(1))",
        "try:\n    Solution().f(1)\nexcept ValueError:\n    pass",
    ],
)
def test_what_cannot_be_expressed_is_refused(test):
    with pytest.raises(UnsupportedTest, match="test 1 "):
        Oracle((test,))


def test_hostile_results_cannot_make_the_trusted_side_work_for_ever():
    assert not passes("assert Solution().f(1) * [0] == [0]", 10**12)
    assert not passes("assert 2 ** Solution().f(1) == 4", 10**12)
    assert not passes("assert 1 << Solution().f(1) == 4", 10**12)
    assert not passes("assert Solution().f(1) % 7 == 3", "%999999999d")
    assert not passes("x = Solution().f(1)\nwhile x:\n    pass", 1)
    assert not passes("assert list(range(Solution().f(1)))", 10**12)


OPAQUE = plain.Opaque("Always")


@pytest.mark.parametrize("result", [OPAQUE, [OPAQUE], {"a": (1, [OPAQUE])}, {OPAQUE}, plain.ListNode((OPAQUE,))])
@pytest.mark.parametrize(
    "condition",
    ["{} != 3", "3 != {}", "not {} == 3", "{} not in (3, 4)", "3 not in [{}]", "{} not in []", "{} is not None"],
)
def test_opaque_data_is_neither_equal_nor_unequal_at_any_depth(condition, result):
    test = f"assert {condition.format('Solution().f(1)')}"
    assert passes(test, 5)
    assert not passes(test, result)


def test_opaque_data_is_no_different_list():
    test = "assert not is_same_list(Solution().f(1), list_node([1]))"
    assert passes(test, plain.ListNode((2,)))
    assert not passes(test, OPAQUE)


@pytest.mark.parametrize(
    ("test", "right", "wrong"),
    [
        ("assert abs(Solution().f(1) - 1.0) < 1e-6", 1, True),
        ("assert abs(1.0 - Solution().f(1)) < 1e-6", 1.0, True),
        ("assert abs(Solution().f(1)) == 1", -1, True),
        ("assert Solution().f(1) + 0 == 1", 1, True),
        ("assert -Solution().f(1) == -1", 1, True),
        ("assert round(Solution().f(1), 2) == 1", 1.001, True),
        ("assert Solution().f(1) >= 1", 1, True),
        ("assert 0 <= Solution().f(1) < 2", 1, True),
        ("assert math.isclose(Solution().f(1), 1.0)", 1, True),
        ("assert isclose(1.0, Solution().f(1), rel_tol=1e-6)", 1, True),
        ("assert Solution().f(1).count(1) == 2", [1, 1, 0], [1, True, 0]),
        ("assert Solution().f(1).index(1) == 0", [1, 0], [True, 1]),
        ("assert Solution().f(1).index(1, 1) == 2", [1, 0, 1], [1, 1, 0]),
        ("assert Solution().f(1) & True == True", True, False),
        ("assert Solution().f(1) <= True", False, 0),
    ],
)
def test_a_bool_is_no_number(test, right, wrong):
    assert passes(test, right)
    assert not passes(test, wrong)


def test_a_missing_item_ends_no_iteration_early():
    test = "x = Solution().f(1)\nassert all(map(lambda y: x.index(y) >= 0, [9]))"
    assert passes(test, [9])
    assert not passes(test, [1])


@pytest.mark.parametrize("build", ["set({})", "frozenset({})", "Counter({})", "{{x for x in {}}}"])
def test_sets_of_numbers_that_share_a_hash_are_refused(build):
    test = f"assert len({build.format('Solution().f(1)')}) == 500"
    assert passes(test, list(range(500)))
    assert passes(test, [*range(500)] * 3)
    assert not passes(test, [k * (2**61 - 1) for k in range(1, 501)])


def test_more_values_than_the_limit_are_refused():
    plain.Decoder(3).decode([1, 2])
    with pytest.raises(ValueError, match="too many"):
        plain.Decoder(3).decode([1, 2, 3])
