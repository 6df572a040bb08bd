"""The version that files carry, and the commit of the code that wrote them."""

import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

__version__ = version("projected-grpo")


@cache
def code_version() -> str:
    """The version, and the commit of the working tree where there is one."""
    here = Path(__file__).resolve().parent
    try:
        if Path(_git(here, "rev-parse", "--show-toplevel"), "src", "projected_grpo") != here:
            raise FileNotFoundError  # installed somewhere below another repository
        commit = _git(here, "rev-parse", "HEAD")
        changed = " with uncommitted changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else ""
    except (OSError, subprocess.SubprocessError):
        return f"projected-grpo {__version__}; no git commit is known"
    return f"projected-grpo {__version__}, commit {commit}{changed}"


def _git(here: Path, *args: str) -> str:
    asked = ["git", "--no-optional-locks", "-C", str(here), *args]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()
