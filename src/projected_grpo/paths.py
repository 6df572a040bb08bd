"""Where things lie: the data that comes with the project, and the cache of what is computed once."""

import os
from pathlib import Path

from projected_grpo.errors import InputError

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


def check_out(path: Path, overwrite: bool) -> None:
    """Refuse, before any work is done, an output file that exists already or could not be written.

    Raises:
        InputError: it exists and `overwrite` is off, it is a folder, or a file stands where its folder should be.
    """
    if path.is_dir():
        raise InputError(f"--out {path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise InputError(f"--out {path} exists; choose another file or add --overwrite")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"--out {path} cannot be written: {parent} is no folder that one can write to")
