"""Where things lie: the data that comes with the project, and the cache of what is computed once."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from projected_grpo.errors import InputError

MANIFEST = "files.json"
"""In a sealed folder: the hash of each of its files."""
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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; what stands there at the end takes the place of `path`, so that a file is there
    whole or not at all, whenever the process is killed. After an exception `path` is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def seal(folder: Path) -> None:
    """Write down the hashes of all files in `folder`: from now on it is whole, until one of them is another."""
    with replacing(folder / MANIFEST) as scratch:
        scratch.write_text(_manifest(folder))


def is_whole(folder: Path) -> bool:
    """Whether `folder` was sealed and holds what it held then."""
    try:
        return (folder / MANIFEST).read_text() == _manifest(folder)
    except (OSError, UnicodeDecodeError):
        return False


def _manifest(folder: Path) -> str:
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(MANIFEST):
            with path.open("rb") as file:
                hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return json.dumps(hashes, indent=1)


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def check_out(path: Path, overwrite: bool) -> None:
    """Refuse, before any work is done, an output file that exists already or could not be written.

    Raises:
        InputError: it exists and `overwrite` is off, it is a folder, or a file stands where its folder should be.
    """
    if path.is_dir():
        raise InputError(f"--out {path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise InputError(f"--out {path} exists; choose another file or add --overwrite")
    parent = existing(path.absolute().parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"--out {path} cannot be written: {parent} is no folder that one can write to")
