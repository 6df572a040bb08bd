"""The trusted comparison: strict equality, the wire format, and tests as small programs."""

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from projected_grpo.env import plain
from projected_grpo.env.compare import Oracle, UnsupportedTest
from projected_grpo.env.sandbox import WORKER

plain_keys = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4))
plain_values = st.recursive(
    st.one_of(plain_keys, st.floats(), st.binary(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(plain_keys, inner, max_size=4),
        st.sets(plain_keys, max_size=4),
    ),
    max_leaves=12,
)


def passes(test: str, *results, after=()):
    """Whether one test holds for the values that its calls returned."""
    oracle = Oracle((test,))
    return oracle.judge([(value, list(after)) for value in results]) is None


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
    assert repr(back) == repr(value) or plain.strict_equal(back, value)


def test_worker_encoder_mirrors_ours():
    values = "[[1, 2.5, True, None, 'x', (1,), {2}, {'a': [3]}, b'z', 1j, float('inf'), 10**5000, frozenset()]]"
    script = (
        "import importlib.util, json, sys\n"
        f"spec = importlib.util.spec_from_file_location('worker', {str(WORKER)!r})\n"
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
    assert json.loads(oracle.wire) == [[0, "f", None, [], {"n": -7, "x": [1, {"tuple": [2.5, None]}]}, []]]
    assert "424242" not in oracle.wire


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


def test_in_place_result_is_the_argument_afterwards():
    test = "nums = [3, 1]\nSolution().f(nums)\nassert nums == [1, 3]"
    assert json.loads(Oracle((test,)).wire)[0][-1] == [0]
    assert passes(test, None, after=[[1, 3]])
    assert not passes(test, None, after=[[3, 1]])


def test_several_calls_on_one_instance():
    test = "s = Solution()\nassert s.f(1) == 2\nassert s.f(2) == 3"
    assert [call[2] for call in json.loads(Oracle((test,)).wire)] == [0, 0]
    assert passes(test, 2, 3)
    assert not passes(test, 2, 2)


def test_every_assert_counts_and_a_missing_result_fails():
    oracle = Oracle(("assert Solution().f(1) == 1", "assert 2 == 2", "assert Solution().f(2) == 2"))
    assert oracle.judge([(1, []), (2, [])]) is None
    assert oracle.judge([(1, []), (3, [])]) == 3
    assert oracle.judge([(1, [])]) == 3
    assert Oracle(("assert 1 == 2",)).judge([]) == 1


@pytest.mark.parametrize(
    "test",
    [
        "assert Solution().f(",
        "import os\nassert Solution().f(1) == 1",
        "assert __import__('os').getcwd() == Solution().f(1)",
        "assert Solution().f(Solution().f(1)) == 1",
        "assert helper(Solution().f(1))",
        "assert all(Solution().f(i) == i for i in range(3))",
        "assert open('x').read() == Solution().f(1)",
        "assert Solution().f(1).real.__class__ == 1",
        "for i in [1]:\n    assert Solution().f(i) == 1",
    ],
)
def test_what_cannot_be_expressed_is_refused(test):
    with pytest.raises(UnsupportedTest, match="test 1 "):
        Oracle((test,))


def test_hostile_results_cannot_make_the_trusted_side_work_for_ever():
    assert not passes("assert Solution().f(1) * [0] == [0]", 10**12)
    assert not passes("assert 2 ** Solution().f(1) == 4", 10**12)
    assert not passes("assert 1 << Solution().f(1) == 4", 10**12)


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
