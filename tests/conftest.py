"""What every test shares: a cache of its own, so that no test depends on what the machine has cached, and one thread,
so that the small models of the tests do not wait for each other; and the material of a whole run in miniature."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

PROBLEMS = """
[[problem]]
id = "double"
title = "Double"
difficulty = "easy"
func_name = "double"
statement = '''Return twice n.'''
starter_code = '''class Solution:
    def double(self, n: int) -> int:
        # Add your code here
'''
canonical_solution = '''class Solution:
    def double(self, n: int) -> int:
        return 2 * n
'''
tests = ["assert Solution().double(n = 2) == 4", "assert Solution().double(n = 5) == 10"]

[[problem]]
id = "negate"
title = "Negate"
difficulty = "easy"
func_name = "negate"
statement = '''Return minus n.'''
starter_code = '''class Solution:
    def negate(self, n: int) -> int:
        # Add your code here
'''
canonical_solution = '''class Solution:
    def negate(self, n: int) -> int:
        return -n
'''
tests = ["assert Solution().negate(n = 2) == -2", "assert Solution().negate(n = -5) == 5"]

[[problem]]
id = "square"
title = "Square"
difficulty = "easy"
func_name = "square"
statement = '''Return n times n.'''
starter_code = '''class Solution:
    def square(self, n: int) -> int:
        # Add your code here
'''
canonical_solution = '''class Solution:
    def square(self, n: int) -> int:
        return n * n
'''
tests = ["assert Solution().square(n = 3) == 9", "assert Solution().square(n = -5) == 25"]
"""


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    import torch

    os.environ["PROJECTED_GRPO_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """Folder with problems.toml, pairs.jsonl and pool.jsonl: three one-line problems, four short pairs."""
    from projected_grpo.env.problems import load_problems
    from projected_grpo.pool import build_pool
    from projected_grpo.templates import template_completions

    folder = tmp_path_factory.mktemp("material")
    (folder / "problems.toml").write_text(PROBLEMS)
    pairs = [
        {
            "id": f"pair-{i}",
            "axis": "weak_run_tests",
            "prompt": [{"role": "user", "content": f"Return n plus {i}."}],
            "hack": f"def f(n): return 0\ndef run_tests(): print(f({i}))",
            "clean": f"def f(n): return n + {i}\ndef run_tests(): assert f(1) == {i + 1}",
        }
        for i in range(4)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    problems = load_problems(folder / "problems.toml")
    build_pool(problems, template_completions(problems, rows_per_problem=4), folder / "pool.jsonl")
    return folder


@pytest.fixture
def small_config(material, tmp_path):
    """A run in miniature: 4 steps of 2 problems x 4 rows, half of them the teacher's."""
    from projected_grpo.presets import preset_defaults

    return replace(
        preset_defaults("smoke"),
        problems=str(material / "problems.toml"),
        pairs=str(material / "pairs.jsonl"),
        teacher_pool=material / "pool.jsonl",
        out_root=tmp_path / "runs",
        v_hack_k=2,
        steps=4,
        prompts_per_step=2,
        group_size=4,
        micro_batch=4,
        max_completion_length=220,
        rollout_grad_every=2,
        save_every=2,
        grader_workers=1,
    )


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder of published rows and rollouts, which stands beside a checkout and is no part of it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the published sample (../shared) is not on this machine")
    return folder
