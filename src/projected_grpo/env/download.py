"""The published benchmark's files, from their repository, with their checksums verified.

GitHub lists every file of a commit with its git blob hash, which is a hash of the content: what arrives is checked
against it. The first download also writes SHA256SUMS beside the files; a later one has to find the same content.
"""

import hashlib
import http.client
import json
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from projected_grpo.errors import InputError
from projected_grpo.paths import replacing

REPOSITORY = "ariahw/rl-rewardhacking"
WANTED = re.compile(r"(^|/)leetcode_(train|test)_medhard[^/]*\.jsonl$")
API, RAW = "https://api.github.com", "https://raw.githubusercontent.com"
SUMS = "SHA256SUMS"
TIMEOUT = 60.0
"""Seconds without an answer."""


@dataclass(frozen=True)
class Source:
    """Where the files are; the tests put a server of their own here."""

    repository: str = REPOSITORY
    ref: str = "main"
    api: str = API
    raw: str = RAW


def download(folder: Path, source: Source | None = None) -> list[Path]:
    """Fetch the benchmark's jsonl files into `folder`; files that are there with the right content stay.

    Raises InputError without a network, for a repository without such files, and for content that is not what the
    repository or an earlier download says; nothing is overwritten by content that fails.
    """
    source = source or Source()
    commit = _json(f"{source.api}/repos/{source.repository}/commits/{source.ref}")["sha"]
    tree = _json(f"{source.api}/repos/{source.repository}/git/trees/{commit}?recursive=1")["tree"]
    wanted = {entry["path"]: entry["sha"] for entry in tree if entry["type"] == "blob" and WANTED.search(entry["path"])}
    if not wanted:
        raise InputError(f"{source.repository} at {source.ref} has no file of the benchmark; give a file by its path")
    folder.mkdir(parents=True, exist_ok=True)
    known = _sums(folder / SUMS)
    done = []
    for path, blob in sorted(wanted.items()):
        target = folder / Path(path).name
        here = target.read_bytes() if target.is_file() else b""
        if blob_hash(here) != blob:
            data = _get(f"{source.raw}/{source.repository}/{commit}/{path}")
            if blob_hash(data) != blob:
                raise InputError(f"{path}: what arrived is not what {source.repository} lists; try again")
            _check_known(known, path, target, data)
            with replacing(target) as scratch:
                scratch.write_bytes(data)
        else:
            _check_known(known, path, target, here)
        known[target.name] = _sha256(target.read_bytes())
        done.append(target)
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(known.items())))
    return done


def _check_known(known: dict[str, str], path: str, target: Path, data: bytes) -> None:
    if known.get(target.name, _sha256(data)) != _sha256(data):
        sums = target.with_name(SUMS)
        raise InputError(f"{path}: is no longer the file whose hash is in {sums}; download to another folder")


def blob_hash(data: bytes) -> str:
    """git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sums(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    return {name: digest for digest, name in (line.split() for line in path.read_text().splitlines())}


def _get(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            return answer.read()
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            f"{url} cannot be fetched ({reason}); with no network, copy the file here and give its path"
        ) from None


def _json(url: str) -> dict:
    try:
        return json.loads(_get(url))
    except ValueError:
        raise InputError(f"{url} answers with something that is no JSON; try again later") from None
