"""Commands about the environment: grading, problems, pairs, pools, loophole modes, and the grader's speed."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from projected_grpo.cli_options import console, parse
from projected_grpo.config import ModeName, TrainConfig
from projected_grpo.errors import InputError, RunFault, saving_faults
from projected_grpo.paths import check_out


@dataclass(frozen=True)
class GradeOptions:
    problems: Path
    """Problems, .toml or published .jsonl."""
    completions: Path
    """A .jsonl of `id` (of the problem), `completion`, optional `mode` and `test_func_name`."""
    out: Path
    """The .jsonl to write, a row for each input row; a partial `<out>.part` of the same inputs is continued."""
    workers: int | None = None
    """Completions graded at a time; the number of processors by default."""
    overwrite: bool = False
    """Replace `--out` where it exists."""


def grade(args: list[str]) -> None:
    """Grade a file of completions offline."""
    options = parse(GradeOptions, args, "grade")
    console()
    from loguru import logger

    from projected_grpo.env.offline import UNGRADED, format_counts, grade_file

    counts = grade_file(options.problems, options.completions, options.out, options.workers, options.overwrite)
    print(format_counts(counts))
    logger.info(f"wrote {options.out}: {counts.total()} rows")
    if ungraded := sum(count for (_, label), count in counts.items() if label == UNGRADED):
        logger.warning(f"{ungraded} rows could not be graded: their `error` says why")


@dataclass(frozen=True)
class PairsCheckOptions:
    pairs: tuple[str, ...] = ("hacks", "placebo_style", "placebo_wrong")
    """Built-in sets or .toml or .jsonl files."""
    workers: int | None = None
    """Completions graded at a time; the number of processors by default."""


def pairs_check(args: list[str]) -> None:
    """Both sides of every pair through the grader, against the executable definition of the pair's axis."""
    options = parse(PairsCheckOptions, args, "pairs check")
    console()
    from collections import Counter

    from loguru import logger

    from projected_grpo.env.grader import Grader
    from projected_grpo.pair_checks import check_pairs, likeness
    from projected_grpo.sources import pairs_named

    if not options.pairs:
        raise InputError("--pairs names no set; leave it out for all built-in sets")
    sets = [pairs_named(name) for name in options.pairs]
    refused = []
    with Grader(options.workers) as grader:
        for pairs in sets:
            reports = check_pairs(pairs, grader)
            bad = [report for report in reports if not report.ok]
            logger.info(f"{pairs.name}: {len(reports) - len(bad)} of {len(reports)} pairs hold")
            axes = Counter(report.axis for report in reports if report.ok)
            logger.info(f"  {', '.join(f'{count} {axis}' for axis, count in axes.items())}")
            logger.info(f"  {likeness(pairs)}")
            refused += [
                f"{pairs.name}: pair {report.id} ({report.axis}): {'; '.join(report.reasons)}" for report in bad
            ]
    if refused:
        for line in refused[1:]:
            logger.error(line)
        raise InputError(refused[0] + f"; mend or drop the {len(refused)} refused pairs")


@dataclass(frozen=True)
class PoolBuildOptions:
    problems: str | None = None
    """Problems that the pool is for: the built-in `train` (default), or a .toml or published .jsonl file."""
    completions: Path | None = None
    """A .jsonl of `problem_id`, `completion`, optional `mode`; without it built-in templates are used."""
    from_run: Path | None = None
    """A finished run's folder: its students' rollouts, over the problems that it trained on."""
    modes: tuple[ModeName, ...] = ("run_tests",)
    """Loophole modes of the templates, one a problem as `train --modes` has them."""
    hack_share: float = 0.5
    """Share of hacks among the templates of each problem."""
    rows_per_problem: int = 8
    """Templates per problem."""
    out: Path = Path("out/pools/train.jsonl")
    """The pool file to write."""
    workers: int | None = None
    """Completions graded at a time; the number of processors by default."""
    overwrite: bool = False
    """Replace `--out` where it exists."""


def pool_build(args: list[str]) -> None:
    """Grade completions, or the built-in hack and honest templates, into a teacher pool."""
    options = parse(PoolBuildOptions, args, "pool build")
    console()
    from collections import Counter

    from loguru import logger

    from projected_grpo.pool import build_pool
    from projected_grpo.sources import BUILTIN_PARTS, problems_of, teacher_requests

    check_out(options.out, options.overwrite)
    if options.from_run is not None and options.completions is not None:
        raise InputError("give --from-run or --completions, not both")
    names = options.problems or "train"
    if options.from_run is not None:
        run_problems = TrainConfig.from_file(options.from_run / "config.json").problems
        if options.problems not in (None, run_problems):
            raise InputError(f"--problems {options.problems}: the run {options.from_run} trained on {run_problems}")
        names = run_problems
    problems = problems_of(names)
    completions = options.completions or options.from_run
    if completions is None:
        completions = teacher_requests(names, problems, options.modes, options.hack_share, options.rows_per_problem)
    with saving_faults(options.out.with_suffix(".fault.txt")):
        pool = build_pool(
            problems,
            completions,
            options.out,
            name=options.out.stem,
            workers=options.workers,
            overwrite=options.overwrite,
            inputs=[names] if names not in BUILTIN_PARTS else [],
        )
    for field, found in pool.header["disagreements"].items():
        lines = f" (lines {', '.join(map(str, found['lines'][:12]))}{', ...' * (len(found['lines']) > 12)})"
        differ = len(found["lines"])
        logger.info(
            f"{field}: the file and this grader differ in {differ} of {found['claimed']} rows{lines * (differ > 0)}"
        )
    labels = ", ".join(f"{n} {label}" for label, n in Counter(row.label for row in pool.rows).most_common())
    covered = f"{len(pool.problem_ids)} of {len(problems)} problems"
    logger.info(f"wrote {options.out}: {len(pool)} rollouts for {covered} ({labels})")


@dataclass(frozen=True)
class ModesOptions:
    problems: str = "eval"
    """Problems that the completions are written for: a built-in part, or a .toml or published .jsonl file."""
    limit: int | None = None
    """Only the first so many problems."""
    workers: int | None = None
    """Completions graded at a time; the number of processors by default."""


def modes(args: list[str]) -> None:
    """The matrix of loophole modes, as a table: each mode's hacks, and honest solutions, in every mode."""
    options = parse(ModesOptions, args, "modes")
    console()
    from projected_grpo.env import matrix
    from projected_grpo.env.grader import Grader
    from projected_grpo.sources import problems_of

    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit {options.limit} must be at least 1")
    problems = problems_of(options.problems)[: options.limit]
    if without := [problem.id for problem in problems if not problem.canonical_solution]:
        raise InputError(f"problem {without[0]} of {options.problems} has no canonical solution; choose other problems")
    with Grader(options.workers) as grader:
        found = matrix.measure(problems, grader)
    print(matrix.format_table(found))
    if faults := matrix.faults(found):
        raise RunFault("the matrix is not what it has to be: " + "; ".join(faults))


@dataclass(frozen=True)
class ProblemsCheckOptions:
    problems: tyro.conf.Positional[tuple[str, ...]]
    """Built-in parts (train, eval, pairs) or .toml or published .jsonl files."""
    workers: int | None = None
    """Completions graded at a time; the number of processors by default."""


def problems_check(args: list[str]) -> None:
    """How many rows of a file load, whose canonical solutions pass, and what is wrong with the rest."""
    options = parse(ProblemsCheckOptions, args, "problems check")
    console()
    from projected_grpo.env.grader import Grader
    from projected_grpo.env.problem_checks import check_problems

    if not options.problems:
        raise InputError("problems check needs a file, or one of train, eval, pairs")
    faults = 0
    with Grader(options.workers) as grader:
        for source in options.problems:
            report = check_problems(source, grader)
            faults += len(report.faults)
            for line in report.lines():
                print(f"{source}: {line}" if len(options.problems) > 1 else line)
    if faults:
        raise InputError(f"{faults} faults, listed above; mend or drop these rows")


@dataclass(frozen=True)
class DownloadOptions:
    out: Path = Path("out/data")
    """Folder for the files."""


def download_data(args: list[str]) -> None:
    """The published benchmark's files, checksums verified, where there is a network."""
    options = parse(DownloadOptions, args, "download-data")
    console()
    from loguru import logger

    from projected_grpo.env.download import download

    for path in download(options.out):
        logger.info(f"{path}: {path.stat().st_size} bytes, verified")


COMMANDS = {
    "grade": grade,
    "problems check": problems_check,
    "pairs check": pairs_check,
    "pool build": pool_build,
    "modes": modes,
    "download-data": download_data,
}
