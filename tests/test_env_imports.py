"""Grading must be cheap to start and impossible to couple to training: checked in a fresh interpreter."""

import pkgutil
import subprocess
import sys

import projected_grpo.env


def test_env_and_pool_import_nothing_heavy():
    names = [module.name for module in pkgutil.walk_packages(projected_grpo.env.__path__, "projected_grpo.env.")]
    code = (
        "import importlib, sys\n"
        f"for name in {[*names, 'projected_grpo.pool']!r}: importlib.import_module(name)\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'peft', 'numpy', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert "projected_grpo.env.grader" in names


def test_of_the_untrusted_side_the_package_imports_names_alone():
    code = "import projected_grpo.env.grader, sys; print([m for m in sys.modules if 'env.untrusted.' in m])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['projected_grpo.env.untrusted.modules']"
