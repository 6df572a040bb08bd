"""Reading rows with their line numbers, so that every fault of a file can be named as file:line."""

import codecs
import gzip
import json
import re
import tomllib
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from projected_grpo.errors import InputError

Rows = Iterator[tuple[int, dict[str, Any]]]


def read_rows(path: Path, table: str, faults: list[str] | None = None) -> Rows:
    """(line, row) of a .toml file of `[[table]]`s or of a .jsonl file of objects. Raises InputError.

    `faults`: see `read_jsonl`.
    """
    if path.suffix == ".toml":
        return read_toml(path, table)
    if path.suffix == ".jsonl" or path.name.endswith(".jsonl.gz"):
        return read_jsonl(path, faults)
    raise InputError(f"{path}: {table}s are read from .toml or .jsonl, not {path.suffix or 'a bare name'}")


def read_jsonl(path: Path, faults: list[str] | None = None) -> Rows:
    """(line, row) of a file of one JSON object a line, gzipped or not. Raises InputError with file and line.

    Where `faults` is given, a line that is no JSON object is put there, with its reason, and reading goes on.
    """
    _check_file(path)
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for line, content in enumerate(_lines(file, path), start=1):
            content = content.removeprefix(codecs.BOM_UTF8) if line == 1 else content
            if not content.strip():
                continue
            try:
                yield line, _object(content, f"{path}:{line}")
            except InputError as error:
                if faults is None:
                    raise
                faults.append(str(error))


def _object(content: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: is no JSON object")
    return row


def _lines(file: Iterable[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: is no whole gzip file: {error}") from None


def read_toml(path: Path, table: str) -> Rows:
    """(line of its header, row) of every `[[table]]`. Raises InputError with file and line."""
    _check_file(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    try:
        rows = tomllib.loads(text).get(table, [])
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"at line (\d+)", str(error))
        line = int(at[1]) if at else len(text.splitlines())
        raise InputError(f"{path}:{line}: is not valid TOML: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: `{table}` is no array of tables; write [[{table}]], in double brackets")
    # tomllib gives no line numbers: count the headers, with multi-line strings (which may hold one) blanked out.
    blank = re.sub(r"'''.*?'''|\"\"\".*?\"\"\"", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)
    header = re.compile(rf"\s*\[\[\s*{table}\s*\]\]")
    lines = [n for n, line in enumerate(blank.splitlines(), start=1) if header.match(line)]
    yield from zip(lines if len(lines) == len(rows) else [1] * len(rows), rows, strict=True)


def _check_file(path: Path) -> None:
    try:
        if not path.is_file():
            raise InputError(f"{path}: {'is no file to read' if path.exists() else 'no such file'}")
        with path.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
