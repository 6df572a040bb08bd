"""Where things lie: the data that comes with the project, and the cache of what is computed once."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_path(*parts: str) -> Path:
    """Path of a file under `data/`: inside the package in a wheel, at the repository's root in a checkout."""
    packaged = _PACKAGE / "data"
    root = packaged if packaged.is_dir() else _PACKAGE.parents[1] / "data"
    return root.joinpath(*parts)


def cache_dir(*parts: str) -> Path:
    """Path under the cache: `$PROJECTED_GRPO_CACHE`, else `$XDG_CACHE_HOME/projected_grpo` or `~/.cache/...`."""
    override = os.environ.get("PROJECTED_GRPO_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "projected_grpo"
    return (Path(override) if override else base).joinpath(*parts)
