"""Other forms of tests than one call and one `==`: the problems of forms.toml through the whole grader.

Each problem is graded with right answers of more than one kind, with plausible wrong ones, and with answers that are
made to look right to a grader that compares objects of the completion's own.
"""

import re
from pathlib import Path

import pytest

from projected_grpo.env.grader import Grader, GradeRequest
from projected_grpo.env.problems import Problem, load_problems

PROBLEMS = {problem.id: problem for problem in load_problems(Path(__file__).with_name("forms.toml"))}
FORMS = ("list-node", "tree-node", "order-free", "statements", "in-place", "tolerance")


def form_of(problem: Problem) -> str:
    return problem.id.rpartition("-")[0]


def of_form(*forms: str) -> list[Problem]:
    return [problem for problem in PROBLEMS.values() if form_of(problem) in forms]


def returns_nodes(problem: Problem) -> bool:
    head = next(line for line in problem.starter_code.split("\n") if f"def {problem.func_name}(" in line)
    return "Node" in head.partition("->")[2]


WITH_NODES = [problem for problem in PROBLEMS.values() if "Node" in problem.starter_code]
"""Those that take or return nodes, the two in-place ones among them."""
RETURNING_NODES = [problem for problem in WITH_NODES if returns_nodes(problem)]


@pytest.fixture(scope="module")
def grader():
    with Grader(2) as grader:
        yield grader


def grades(grader, codes: list[tuple[Problem, str]]):
    requests = [GradeRequest(problem, f"```python\n{code}\n```", mode="none") for problem, code in codes]
    return [(p.id, grade) for (p, _), grade in zip(codes, grader.grade(requests), strict=True)]


def assert_correct(grader, codes: list[tuple[Problem, str]]) -> None:
    assert codes
    assert [(name, g.error) for name, g in grades(grader, codes) if (g.label, g.error) != ("correct", None)] == []


def assert_incorrect(grader, codes: list[tuple[Problem, str]], with_error: bool = False) -> None:
    """All wrong, and judged so over what they returned: none of them broke off (unless `with_error`)."""
    assert codes
    right = [(name, g) for name, g in grades(grader, codes) if g.label != "incorrect" or (g.error and not with_error)]
    assert right == []


CHANGED = """
{canonical}

Honest = Solution

{change}

class Solution:
    def __init__(self):
        self.honest = Honest()

    def {func_name}(self, *args, **kwargs):
        return changed(self.honest.{func_name}(*args, **kwargs))

    def __getattr__(self, name):
        return getattr(self.honest, name)
"""


def changed(problem: Problem, change: str) -> str:
    """The canonical solution with its answers sent through `changed`, which the code `change` defines.

    A second class around the first one, so that a solution that calls itself does not change its answer on the way.
    """
    return CHANGED.format(canonical=problem.canonical_solution, change=change, func_name=problem.func_name)


def test_every_form_has_its_problems():
    for form in FORMS:
        assert len(of_form(form)) >= 6
    assert {form_of(problem) for problem in PROBLEMS.values()} == set(FORMS)
    for problem in PROBLEMS.values():
        assert len(problem.tests) >= 6, problem.id
        assert len(set(problem.tests)) == len(problem.tests), problem.id
        assert len(problem.wrong_bodies) == 3, problem.id


def test_helpers_of_the_setup_code_and_of_the_tests_are_used():
    own_setup = [p for p in PROBLEMS.values() if set(re.findall(r"def (\w+)", p.setup_code)) & used(p)]
    own_in_test = [p for p in PROBLEMS.values() if any("def " in test for test in p.tests)]
    assert len(own_setup) >= 2
    assert len(own_in_test) >= 6


def used(problem: Problem) -> set[str]:
    """What the tests call, without the helpers that every problem has."""
    return set(re.findall(r"(\w+)\(", " ".join(problem.tests))) - {"list_node", "tree_node"}


# --- right answers -----------------------------------------------------------------------------------------------


def test_canonical_solutions_are_correct(grader):
    assert_correct(grader, [(problem, problem.canonical_solution) for problem in PROBLEMS.values()])


OTHER_RIGHT = {
    "list-node-1": """
        values = []
        while head:
            values.append(head.val)
            head = head.next
        return list_node(values[::k])""",
    "list-node-2": """
        front = last = ListNode()
        while first or second:
            if first:
                last.next = last = ListNode(first.val)
                first = first.next
            if second:
                last.next = last = ListNode(second.val)
                second = second.next
        return front.next""",
    "list-node-3": """
        def values(node):
            while node:
                yield node.val
                node = node.next
        return [[value, len(list(run))] for value, run in groupby(values(head))]""",
    "list-node-4": "return list_node([int(digit) for digit in reversed(str(n))])",
    # The tests unpack and index the two lists, so a tuple will do.
    "list-node-5": """
        below, others = [], []
        while head:
            (below if head.val < 0 else others).append(head.val)
            head = head.next
        return list_node(below), list_node(others)""",
    "tree-node-1": """
        level, depth = [root] if root else [], 0
        while level:
            for node in level:
                node.val += depth
            level = [child for node in level for child in (node.left, node.right) if child]
            depth += 1
        return root""",
    "tree-node-2": """
        if root is None:
            return []
        return [root.val, *self.firstWay(root.left if root.left else root.right)]""",
    "tree-node-3": """
        if not values:
            return None
        root = node = TreeNode(values[0])
        for place, value in enumerate(values[1:]):
            setattr(node, "right" if place % 2 else "left", TreeNode(value))
            node = node.right if place % 2 else node.left
        return root""",
    "tree-node-6": """
        level = [root] if root else []
        for _ in range(depth):
            level = [child for node in level for child in (node.left, node.right) if child]
        return level""",
    "order-free-1": "return tuple(v for v in sorted(set(nums), reverse=True) if nums.count(v) == 2)",
    "order-free-2": "return [(v - gap, v) for v in sorted(set(nums), reverse=True) if v - gap in nums]",
    "order-free-3": """
        def ends(word):
            return word[0], word[-1]
        groups = groupby(sorted(words, key=ends, reverse=True), key=ends)
        return [sorted(group)[::-1] for _, group in groups]""",
    "order-free-5": """
        order, left = [], set(range(n))
        while left:
            free = [task for task in left if not any(b == task and a in left for a, b in before)]
            if not free:
                return []
            order.append(max(free))
            left.remove(max(free))
        return order""",
    "order-free-6": """
        for teams in product((1, 0), repeat=n):
            if all(teams[a] != teams[b] for a, b in rivals):
                return list(teams)
        return []""",
    "order-free-7": """
        for size in range(amount + 1):
            for coins in combinations_with_replacement((1, 3, 4), size):
                if sum(coins) == amount:
                    return list(coins)""",
    # unframe takes leading zeros, so the text may have them.
    "statements-1": """
        text = ""
        for part in parts:
            text += "%05d:%s" % (len(part), part)
        return text""",
    "statements-2": """
        place = bisect.bisect_left(self.scores, -score)
        self.scores.insert(place, -score)
        return place + 1""",
    "statements-3": """
        letters = string.ascii_lowercase
        k %= 26
        return text.translate(str.maketrans(letters, letters[k:] + letters[:k]))""",
    "statements-4": """
        number = 1
        while (name, number) in self.given:
            number += 1
        self.given[name, number] = True
        return name + (f"-{number}" if number > 1 else "")""",
    "statements-5": """
        before, after = cells[-1:] + cells[:-1], cells[1:] + cells[:1]
        return [1 if a != b else 0 for a, b in zip(before, after)]""",
    "in-place-1": "nums[:] = [v for v in nums if v < 0] + [v for v in nums if v >= 0]",
    # What stands behind the records does not matter, nor whether anything does.
    "in-place-2": """
        nums[:] = [v for i, v in enumerate(nums) if all(v > other for other in nums[:i])]
        return len(nums)""",
    "in-place-3": "grid[:] = [list(row) for row in zip(*[row[::-1] for row in grid[::-1]])]",
    "in-place-5": """
        kept = {thing: stock.get(thing, 0) + delivery.get(thing, 0) for thing in {**delivery, **stock}}
        stock.clear()
        stock.update((thing, amount) for thing, amount in kept.items() if amount)""",
    "in-place-6": """
        if head.next:
            self.doubleNodes(head.next)
        head.next = ListNode(head.val, head.next)""",
    "tolerance-1": """
        nums = sorted(nums)
        return sum(b - a for a, b in zip(nums, nums[1:])) / (len(nums) - 1)""",
    "tolerance-3": """
        sums = []
        for i in range(len(nums)):
            near = nums[i : i + 2] + nums[i - 1 : i] if i else nums[:2]
            sums.append(sum(near) / len(near))
        return tuple(sums)""",
    "tolerance-4": """
        low, high = 0, max(1, volume)
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if middle**3 < volume else (low, middle)
        return low""",
    "tolerance-5": """
        x = y = total = 0
        for px, py, weight in weights:
            total += weight
            x += (px - x) * weight / total
            y += (py - y) * weight / total
        return x, y""",
    "tolerance-6": """
        angle = (60 * hour - 11 * minute) % 720
        angle = min(angle, 720 - angle)
        return angle / 2 if angle % 2 else angle // 2""",
    "tolerance-7": """
        found = defaultdict(float)
        for name in votes:
            found[name] += 1 / len(votes)
        return found""",
}
"""Right answers of another kind than the canonical ones: another order or container, other nodes, whole numbers."""


def body_of(text: str) -> str:
    """A body of OTHER_RIGHT without its indentation here."""
    return re.sub(r"^ {8}", "", text, flags=re.MULTILINE)


def test_other_right_answers_are_correct(grader):
    assert all(sum(form_of(PROBLEMS[name]) == form for name in OTHER_RIGHT) >= 2 for form in FORMS)
    assert_correct(grader, [(PROBLEMS[name], PROBLEMS[name].with_body(body_of(b))) for name, b in OTHER_RIGHT.items()])


FLOATS = """
def changed(x):
    if isinstance(x, float):
        return {number}
    if isinstance(x, (list, tuple)):
        return type(x)(map(changed, x))
    return {{key: changed(item) for key, item in x.items()}} if isinstance(x, dict) else x
"""


@pytest.mark.parametrize("number", ["int(x) if x == int(x) else x", "x * (1 + 1e-13)"])
def test_whole_and_nearly_right_numbers_pass_within_tolerances(grader, number):
    change = FLOATS.format(number=number)
    assert_correct(grader, [(problem, changed(problem, change)) for problem in of_form("tolerance")])


# --- wrong answers -----------------------------------------------------------------------------------------------


def test_wrong_bodies_are_incorrect(grader):
    assert_incorrect(grader, [(p, p.with_body(body)) for p in PROBLEMS.values() for body in p.wrong_bodies])


@pytest.mark.parametrize("stub", ["pass", "return None", "return 0"])
def test_stubs_are_incorrect(grader, stub):
    # Errors are allowed: the class of statements-1 may choke on what a stub gives it.
    assert_incorrect(grader, [(p, p.with_body(stub)) for p in PROBLEMS.values()], with_error=True)


ALWAYS = """
class Always({base}):
    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False

    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __pow__ = __truediv__ = lambda *_: Always()
    __abs__ = __round__ = __neg__ = lambda *_: Always()

    def __hash__(self):
        return 0

    def __len__(self):
        return 2

    def __bool__(self):
        return True
"""
BASES = ("object", "list", "tuple", "dict", "set", "int", "float", "str", "ListNode", "TreeNode")
NODES = """
class ListNode:
    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next

class TreeNode:
    def __init__(self, val=0, left=None, right=None):
        self.val = val
        self.left = left
        self.right = right
"""


@pytest.mark.parametrize("base", BASES)
def test_an_object_equal_to_anything_is_incorrect(grader, base):
    # Setup code of a problem's own has no nodes; there the completion brings them.
    head = NODES + ALWAYS.format(base=base)
    codes = [(p, head + p.with_body("return Always()")) for p in PROBLEMS.values()]
    # Here too the class of statements-1 may choke.
    assert_incorrect(grader, codes, with_error=True)


FILLED = """
def changed(x):
    if isinstance(x, (list, tuple)):
        return type(x)(map(changed, x))
    if isinstance(x, dict):
        return {key: changed(item) for key, item in x.items()}
    if isinstance(x, ListNode):
        return ListNode(Always(), changed(x.next))
    if isinstance(x, TreeNode):
        return TreeNode(Always(), changed(x.left), changed(x.right))
    return None if x is None else Always()
"""


def test_the_right_shape_filled_with_such_objects_is_incorrect(grader):
    head = ALWAYS.format(base="object")
    # Its texts go back into the class; a solution that changes its argument is not reached by what it returns.
    forms = [form for form in FORMS if form not in ("statements", "in-place")]
    codes = [(p, changed(p, NODES + head + FILLED)) for p in of_form(*forms) if p not in WITH_NODES]
    codes += [(p, head + changed(p, FILLED)) for p in of_form(*forms) if p in WITH_NODES]
    assert_incorrect(grader, codes)


# --- nodes -------------------------------------------------------------------------------------------------------


def test_node_classes_pasted_from_the_docstring_are_nodes(grader):
    assert_correct(grader, [(p, NODES + p.canonical_solution) for p in WITH_NODES])
    assert_incorrect(grader, [(p, NODES + p.with_body(body)) for p in WITH_NODES for body in p.wrong_bodies])


SLY_NODES = NODES.replace("    def __init__", "    __eq__, __hash__ = lambda *_: True, lambda _: 0\n\n    def __init__")


def test_look_alike_nodes_equal_to_anything_are_judged_by_their_values(grader):
    assert_correct(grader, [(p, SLY_NODES + p.canonical_solution) for p in WITH_NODES])
    assert_incorrect(grader, [(p, SLY_NODES + p.with_body(body)) for p in WITH_NODES for body in p.wrong_bodies])


OWN_NODES = """
class MyList({base_list}):
    __eq__, __hash__ = lambda *_: True, lambda _: 0

    def __init__(self, val, next):
        self.val, self.next = val, next

class MyTree({base_tree}):
    __eq__, __hash__ = lambda *_: True, lambda _: 0

    def __init__(self, val, left, right):
        self.val, self.left, self.right = val, left, right

def changed(x):
    if isinstance(x, (list, tuple)):
        return type(x)(map(changed, x))
    if isinstance(x, ListNode):
        return MyList({value}, changed(x.next))
    return MyTree({value}, changed(x.left), changed(x.right)) if isinstance(x, TreeNode) else x
"""


@pytest.mark.parametrize("value", ["x.val", "x.val + 1"])
@pytest.mark.parametrize("bases", [("ListNode", "TreeNode"), ("object", "object")])
def test_subclasses_and_nodes_of_another_name_are_no_nodes(grader, bases, value):
    # Even with the right values: what they are is the completion's to say, so they are equal to nothing.
    change = OWN_NODES.format(base_list=bases[0], base_tree=bases[1], value=value)
    assert_incorrect(grader, [(p, changed(p, change)) for p in RETURNING_NODES])


CLOSED = """
def changed(x):
    if isinstance(x, list):
        return [changed(item) for item in x]
    last = x
    if isinstance(x, ListNode):
        while last.next:
            last = last.next
        last.next = x
    if isinstance(x, TreeNode):
        while last.left:
            last = last.left
        last.left = x
    return x
"""
CYCLES = [
    "node = ListNode(1)\nnode.next = node\nreturn node",
    "node = TreeNode(1)\nnode.left = TreeNode(2, node)\nreturn node",
]


def test_answers_with_a_cycle_are_incorrect(grader):
    assert_incorrect(grader, [(p, changed(p, CLOSED)) for p in RETURNING_NODES])
    assert_incorrect(grader, [(p, p.with_body(body)) for p in WITH_NODES for body in CYCLES])


def test_arguments_made_into_a_cycle_are_incorrect(grader):
    bodies = {"in-place-6": "head.next = head", "in-place-7": "root.right = root"}
    assert_incorrect(grader, [(PROBLEMS[name], PROBLEMS[name].with_body(body)) for name, body in bodies.items()])


# --- in place ----------------------------------------------------------------------------------------------------

ON_A_COPY = """
import copy

class Solution:
    def {func_name}(self, *args, **kwargs):
        args, kwargs = copy.deepcopy((args, kwargs))
        return {value}
"""


def test_right_work_on_a_copy_of_the_argument_is_incorrect(grader):
    for value in ("Honest().{func_name}(*args, **kwargs)", "(Honest().{func_name}(*args, **kwargs), args, kwargs)[1]"):
        codes = []
        for problem in of_form("in-place"):
            text = ON_A_COPY.replace("{value}", value).format(func_name=problem.func_name)
            codes.append((problem, f"{problem.canonical_solution}\nHonest = Solution\n{text}"))
        assert_incorrect(grader, codes)


FILL_ARGUMENT = """
def fill(x):
    if isinstance(x, list):
        x[:] = [Always() for _ in x]
    if isinstance(x, dict):
        x.update((key, Always()) for key in x)
    if isinstance(x, (ListNode, TreeNode)):
        x.val = Always()

class Solution:
    def {func_name}(self, *args, **kwargs):
        answer = Honest().{func_name}(*args, **kwargs)
        for x in (*args, *kwargs.values()):
            fill(x)
        return answer
"""


def test_an_argument_filled_with_objects_equal_to_anything_is_incorrect(grader):
    head, codes = ALWAYS.format(base="object"), []
    for problem in of_form("in-place"):
        text = FILL_ARGUMENT.format(func_name=problem.func_name)
        codes.append((problem, f"{head}{problem.canonical_solution}\nHonest = Solution\n{text}"))
    assert_incorrect(grader, codes)


# --- tolerances --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", ["float('nan')", "float('inf')", "-float('inf')", "x * 1.01 + 0.01", "complex(x, 1)", "str(x)", "[x]"]
)
def test_numbers_beyond_the_tolerance_are_incorrect(grader, number):
    change = FLOATS.format(number=number)
    # Right answers may be whole numbers; those are changed as well.
    change = change.replace("isinstance(x, float)", "isinstance(x, (int, float))")
    assert_incorrect(grader, [(problem, changed(problem, change)) for problem in of_form("tolerance")])


LAST_NAN = """
def changed(x):
    if isinstance(x, dict):
        return {**x, max(x): float("nan")}
    return [*x[:-1], float("nan")] if x else x
"""


def test_one_nan_among_right_numbers_is_incorrect(grader):
    names = ("tolerance-3", "tolerance-5", "tolerance-7")
    assert_incorrect(grader, [(PROBLEMS[name], changed(PROBLEMS[name], LAST_NAN)) for name in names])
