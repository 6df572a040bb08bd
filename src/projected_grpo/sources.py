"""What a name on the command line stands for: built-in problems and pairs, those of a preset of its own, or a file."""

import hashlib
from collections.abc import Sequence

from projected_grpo.env.grader import GradeRequest
from projected_grpo.env.problems import SPLITS, Problem, builtin_problems, load_problems
from projected_grpo.micro.tasks import TEMPLATES, micro_problems
from projected_grpo.micro.texts import N_PAIRS, micro_pairs, micro_teacher
from projected_grpo.pairs import PairSet, load_pairs, select
from projected_grpo.smol import PAIR_SETS as SMOL_PAIRS
from projected_grpo.smol import smol_pairs
from projected_grpo.templates import SHORT_HONEST, template_completions

MICRO_PARTS = tuple(f"micro-{part}" for part in TEMPLATES)
BUILTIN_PARTS = (*SPLITS, *MICRO_PARTS)


def problems_of(source: str) -> list[Problem]:
    """The problems of a built-in part (`train`, `micro-train`, ...) by its name, or of a file. Raises InputError."""
    if source in SPLITS:
        return builtin_problems(source)
    if source in MICRO_PARTS:
        return list(micro_problems(source.removeprefix("micro-")))
    return load_problems(source)


def pairs_named(name: str) -> PairSet:
    """A built-in set by its name, or a file of pairs. Raises InputError."""
    if name in SMOL_PAIRS:
        return smol_pairs(name)
    return micro_pairs(name) if name in N_PAIRS else load_pairs(name)


def pairs_selected(name: str, without: Sequence[str], n: int | None, seed: int = 0) -> PairSet:
    """The pairs called `name` but those of the axes `without`, at most `n` of them, drawn by `seed`."""
    return select(pairs_named(name), without, n, seed=seed)


def placebo_of(pairs: str, kind: str) -> str:
    """Name of the placebo set, of kind "style" or "wrong", that goes with the pairs called `pairs`."""
    family = "micro_" if pairs in N_PAIRS else "smol_" if pairs in SMOL_PAIRS else ""
    return f"{family}placebo_{kind}"


def assign_modes(problems: Sequence[Problem], modes: Sequence[str]) -> list[str]:
    """One loophole mode a problem, in turn over the problems in an order of their own; the same in every run."""
    order = sorted(range(len(problems)), key=lambda i: hashlib.sha256(problems[i].id.encode()).digest())
    assigned = [""] * len(problems)
    for turn, i in enumerate(order):
        assigned[i] = modes[turn % len(modes)]
    return assigned


def teacher_requests(
    source: str, problems: Sequence[Problem], modes: Sequence[str], hack_share: float = 0.5, rows_per_problem: int = 8
) -> list[GradeRequest]:
    """Completions by rule for a teacher pool over the problems called `source`, each under its own mode."""
    assigned = assign_modes(problems, modes)
    if source in MICRO_PARTS:
        return micro_teacher(problems, assigned, hack_share, rows_per_problem)
    honest = SHORT_HONEST if source.startswith("smol-") else ()
    requests = []
    for mode in dict.fromkeys(modes):
        own = [problem for problem, its in zip(problems, assigned, strict=True) if its == mode]
        requests += template_completions(own, hack_share, rows_per_problem, mode=mode, honest=honest)
    return requests
