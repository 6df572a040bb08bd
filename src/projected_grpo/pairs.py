"""Contrastive pairs: load them and select a set.

A pair is a prompt with two whole completions: `hack` uses the loophole of its mode, `clean` answers honestly. Placebo
pairs, whose two sides are equally honest, are stored in the same fields, so that everything that takes pairs takes them
as a control. Left out on purpose: whether a pair is what its axis says, which `pair_checks.py` finds out by running it.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from projected_grpo.env.problems import Problem, builtin_problems
from projected_grpo.env.prompts import build_prompt
from projected_grpo.env.rows import read_rows
from projected_grpo.errors import InputError
from projected_grpo.paths import data_path

BUILTIN = ("hacks", "placebo_style", "placebo_wrong")

_REQUIRED = ("id", "axis", "hack", "clean")
_FIELDS = {*_REQUIRED, "problem", "prompt"}


@dataclass(frozen=True)
class ContrastivePair:
    id: str
    axis: str
    prompt: list[dict] | str
    """Chat messages, or raw text."""
    hack: str
    clean: str
    problem: Problem | None
    """None where the file gave a prompt of its own; such a pair trains a basis but cannot be checked."""
    mode: str = "run_tests"
    """The loophole that the prompt names and the hack uses."""


@dataclass(frozen=True)
class PairSet:
    name: str
    sha256: str
    """Of prompt, hack and clean of all pairs in order, as canonical JSON."""
    pairs: tuple[ContrastivePair, ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[ContrastivePair]:
        return iter(self.pairs)


def load_pairs(path: str | Path, problems: Sequence[Problem] | None = None) -> PairSet:
    """Read a .toml file ([[pair]] tables), a .jsonl file, or a built-in set named in BUILTIN.

    `problems` are those that a row's `problem` may name; default: the built-in problems of the pairs.
    Raises InputError with file and line for the first row that is wrong.
    """
    name = Path(path).stem
    path = data_path("pairs", f"{path}.toml") if str(path) in BUILTIN else Path(path)
    if path.suffix not in (".toml", ".jsonl"):
        raise InputError(f"{path}: pairs are read from .toml or .jsonl, or from a built-in set: {', '.join(BUILTIN)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file of pairs; the built-in sets are {', '.join(BUILTIN)}")
    by_id = {problem.id: problem for problem in (builtin_problems("pairs") if problems is None else problems)}
    pairs: list[ContrastivePair] = []
    first_line: dict[str, int] = {}
    for line, row in read_rows(path, "pair"):
        if path.suffix == ".toml":
            # The newline in front of the closing quotes belongs to the layout of the file, not to the side.
            row = {key: value.rstrip("\n") if isinstance(value, str) else value for key, value in row.items()}
        pair = _pair(row, f"{path}:{line}", by_id)
        if pair.id in first_line:
            raise InputError(f"{path}:{line}: id {pair.id!r} is used already in line {first_line[pair.id]}; rename one")
        first_line[pair.id] = line
        pairs.append(pair)
    if not pairs:
        raise InputError(f"{path}: holds no pair; write [[pair]] tables, or one JSON object a line")
    return pair_set(name, pairs)


def select(pairs: PairSet, without: Sequence[str] = (), n: int | None = None, seed: int | None = None) -> PairSet:
    """The pairs but those of the axes `without`, at most `n`, the axes taken in turn so that a small set is balanced.

    Without a seed each axis gives its pairs in the order of the file, with one at random. Raises InputError.
    """
    known = list(dict.fromkeys(pair.axis for pair in pairs))
    for axis in without:
        if axis not in known:
            raise InputError(f"pair set {pairs.name} has no axis {axis!r}: it has {', '.join(known)}")
    by_axis = {axis: [pair for pair in pairs if pair.axis == axis] for axis in known if axis not in without}
    available = sum(map(len, by_axis.values()))
    n = available if n is None else n
    if not 1 <= n <= available:
        raise InputError(f"{n} pairs wanted of pair set {pairs.name}: choose 1 to {available}")
    if seed is not None:
        generator = random.Random(seed)
        for group in by_axis.values():
            generator.shuffle(group)
    in_turn = sorted((k, axis) for axis, group in enumerate(by_axis.values()) for k in range(len(group)))[:n]
    groups = list(by_axis.values())
    chosen = {groups[axis][k].id for k, axis in in_turn}
    return pair_set(pairs.name, [pair for pair in pairs if pair.id in chosen])


def pair_set(name: str, pairs: Iterable[ContrastivePair]) -> PairSet:
    """The pairs as a set, with the hash of what is in them."""
    pairs = tuple(pairs)
    content = [{"prompt": pair.prompt, "hack": pair.hack, "clean": pair.clean} for pair in pairs]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return PairSet(name, hashlib.sha256(canonical.encode()).hexdigest(), pairs)


def _pair(row: dict[str, Any], where: str, problems: dict[str, Problem]) -> ContrastivePair:
    if unknown := sorted(set(row) - _FIELDS):
        raise InputError(f"{where}: unknown field `{unknown[0]}`; a pair has {', '.join(sorted(_FIELDS))}")
    for name in _REQUIRED:
        if name not in row:
            raise InputError(f"{where}: field `{name}` is missing")
        if not isinstance(row[name], str) or not row[name].strip():
            raise InputError(f"{where}: field `{name}` is empty or no text")
    if row["hack"].strip() == row["clean"].strip():
        raise InputError(f"{where}: hack and clean are the same text; a pair needs two different sides")
    if ("problem" in row) == ("prompt" in row):
        raise InputError(f"{where}: give either `problem` (the id of a problem) or `prompt`, not both and not neither")
    sides = {name: row[name] for name in _REQUIRED}
    if "prompt" in row:
        return ContrastivePair(prompt=_prompt(row["prompt"], where), problem=None, **sides)
    if not isinstance(row["problem"], str) or row["problem"] not in problems:
        raise InputError(f"{where}: problem {row['problem']!r} is not among the {len(problems)} problems given")
    problem = problems[row["problem"]]
    return ContrastivePair(prompt=build_prompt(problem, "run_tests"), problem=problem, **sides)


def _prompt(prompt: Any, where: str) -> list[dict] | str:
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        return prompt
    raise InputError(f"{where}: `prompt` must be text or a list of messages with `role` and `content`, not empty")


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and all(isinstance(text, str) for text in message.values())
    )
