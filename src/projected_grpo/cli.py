"""The command line: `projected-grpo COMMAND`, one function a command, heavy imports inside the functions.

Exit codes: 0 done, 2 bad arguments or bad input files (one line that says which and what to do), 130 interrupted,
1 anything else.
"""

import contextlib
import io
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Set
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import tyro

from projected_grpo.config import (
    PRESETS,
    ArmName,
    BasisOptions,
    EvalConfig,
    ExtractConfig,
    TrainConfig,
    preset_defaults,
)
from projected_grpo.errors import InputError, RunFault, RunInterrupted, saving_faults
from projected_grpo.paths import check_out

PROG = "projected-grpo"
DEFAULT_PRESET = "full"


def extract(args: list[str]) -> None:
    """Contrastive pairs to a basis file, or a control of one; prints its table."""
    config = _with_preset(args, "extract", lambda preset: _copy(ExtractConfig, BasisOptions, preset))
    _console()
    from projected_grpo.extract import extract

    extract(config)


def train(args: list[str]) -> None:
    """One arm, one seed: a run's folder under out/runs. `--config FILE` repeats or resumes a run."""
    source, rest = _take(args, "--config")
    if source is not None:
        saved = replace(TrainConfig.from_file(Path(source)), resume=False)
        config = _parse(TrainConfig, rest, "train --config FILE", default=saved)
    else:
        config = _with_preset(args, "train", lambda preset: preset)
    _console()
    from projected_grpo.run import train

    train(config)


def evaluate(args: list[str]) -> None:
    """Hack, attempt and pass rates on held-out problems. `--run FOLDER` evaluates a finished run."""
    source, rest = _take(args, "--run")
    if source is not None:
        folder = Path(source)
        run = TrainConfig.from_file(folder / "config.json")
        default = replace(
            _copy(EvalConfig, EvalConfig, run, skip={"problems"}),
            adapter=folder / "adapter",
            out=folder / "eval.json",
            trained_on=run.problems,
        )
        config = _parse(EvalConfig, rest, "eval --run FOLDER", default=default)
    else:
        config = _with_preset(args, "eval", lambda preset: _copy(EvalConfig, EvalConfig, preset, skip={"problems"}))
    _console()
    from projected_grpo.evaluate import evaluate

    evaluate(config)


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
    options = _parse(GradeOptions, args, "grade")
    _console()
    from loguru import logger

    from projected_grpo.env.offline import grade_file

    counts = grade_file(options.problems, options.completions, options.out, options.workers, options.overwrite)
    for (mode, label), count in sorted(counts.items()):
        logger.info(f"{count:>7}  {mode:<12}{label}")
    logger.info(f"wrote {options.out}: {counts.total()} rows")


@dataclass(frozen=True)
class PairsCheckOptions:
    pairs: tuple[str, ...] = ("hacks", "placebo_style", "placebo_wrong")
    """Built-in sets or .toml or .jsonl files."""
    workers: int | None = None
    """Completions graded at a time; the number of processors by default."""


def pairs_check(args: list[str]) -> None:
    """Both sides of every pair through the grader, against the executable definition of the pair's axis."""
    options = _parse(PairsCheckOptions, args, "pairs check")
    _console()
    from loguru import logger

    from projected_grpo.env.grader import Grader
    from projected_grpo.pair_checks import check_pairs
    from projected_grpo.pairs import load_pairs

    if not options.pairs:
        raise InputError("--pairs names no set; leave it out for all built-in sets")
    sets = [load_pairs(name) for name in options.pairs]
    refused = []
    with Grader(options.workers) as grader:
        for pairs in sets:
            reports = check_pairs(pairs, grader)
            bad = [report for report in reports if not report.ok]
            logger.info(f"{pairs.name}: {len(reports) - len(bad)} of {len(reports)} pairs hold")
            refused += [
                f"{pairs.name}: pair {report.id} ({report.axis}): {'; '.join(report.reasons)}" for report in bad
            ]
    if refused:
        for line in refused[1:]:
            logger.error(line)
        raise InputError(refused[0] + f"; mend or drop the {len(refused)} refused pairs")


@dataclass(frozen=True)
class PoolBuildOptions:
    problems: str = "train"
    """Problems that the pool is for: the built-in `train`, or a .toml or published .jsonl file."""
    completions: Path | None = None
    """A .jsonl of `problem_id`, `completion`, optional `mode`; without it built-in templates are used."""
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
    options = _parse(PoolBuildOptions, args, "pool build")
    _console()
    from collections import Counter

    from loguru import logger

    from projected_grpo.env.problems import problems_of
    from projected_grpo.pool import build_pool

    check_out(options.out, options.overwrite)
    with saving_faults(options.out.with_suffix(".fault.txt")):
        pool = build_pool(
            problems_of(options.problems),
            options.completions,
            options.out,
            name=options.out.stem,
            hack_share=options.hack_share,
            rows_per_problem=options.rows_per_problem,
            workers=options.workers,
            overwrite=options.overwrite,
        )
    labels = ", ".join(f"{n} {label}" for label, n in Counter(row.label for row in pool.rows).most_common())
    logger.info(f"wrote {options.out}: {len(pool)} rollouts for {len(pool.problem_ids)} problems ({labels})")


@dataclass(frozen=True)
class SmokeOptions:
    arms: tuple[ArmName, ...] = ("projected",)
    """Arms to run, one after another."""
    preset: str = "smoke"
    """`smoke` (tiny-random) or `smoke-real` (SmolLM2-135M)."""
    out: Path = Path("out/smoke")
    """Folder for everything; replaced where it exists."""
    seed: int = 41
    """Of every step."""


def smoke(args: list[str]) -> None:
    """extract, pool build, train and eval of every arm asked for, through this command line, on a small model."""
    options = _parse(SmokeOptions, args, "smoke")
    preset_defaults(options.preset)
    basis, pool, seed = options.out / "basis.safetensors", options.out / "pool.jsonl", ["--seed", str(options.seed)]
    small = ["--samples", "1", "--limit", "6"]
    _run("extract", options.preset, "--out", str(basis), "--overwrite", *seed)
    _run("pool", "build", "--out", str(pool), "--overwrite")
    for arm in options.arms:
        where = ["--out-root", str(options.out / "runs"), "--overwrite", *seed]
        _run("train", options.preset, "--arm", arm, "--basis", str(basis), "--teacher-pool", str(pool), *where)
        _run("eval", "--run", str(options.out / "runs" / options.preset / f"{arm}_s{options.seed}"), *small)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "extract": extract,
    "train": train,
    "eval": evaluate,
    "smoke": smoke,
    "grade": grade,
    "pairs check": pairs_check,
    "pool build": pool_build,
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = sys.argv[1:] if argv is None else argv
    try:
        _dispatch(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except RunInterrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return 130
    except RunFault as fault:
        print(f"stopped: {fault}", file=sys.stderr)
        return 1
    return 0


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return
    for words in (2, 1):
        command = COMMANDS.get(" ".join(args[:words]))
        if command is not None:
            command(args[words:])
            return
    raise InputError(f"unknown command {' '.join(args[:2])!r}; use one of {', '.join(COMMANDS)}")


def _run(*args: str) -> None:
    from loguru import logger

    _console()
    logger.info(f"$ {PROG} {' '.join(args)}")
    _dispatch(list(args))


def _help() -> str:
    lines = [f"usage: {PROG} COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<12}  {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", f"`{PROG} COMMAND --help` tells the options of a command."])


def _console() -> None:
    from projected_grpo.steplog import setup_console

    setup_console()
    # TRL's and PEFT's own calls into transformers, which a user of ours cannot change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _take(args: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of a flag that decides the other flags' defaults, and the arguments without it."""
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name == flag:
            if not equals and i + 1 == len(args):
                raise InputError(f"{flag} needs a value")
            return (value, args[:i] + args[i + 1 :]) if equals else (args[i + 1], args[:i] + args[i + 2 :])
    return None, args


def _copy(target: type, shared: type, source: Any, skip: Set[str] = frozenset()) -> Any:
    """A `target` whose fields of `shared` that `source` has too are taken from `source`."""
    names = {f.name for f in fields(shared)} - skip
    return target(**{name: getattr(source, name) for name in names if hasattr(source, name)})


def _with_preset(args: list[str], command: str, build: Callable[[TrainConfig], Any]) -> Any:
    if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
        args = [DEFAULT_PRESET, *args]  # naming the arm alone gives the published setting
    presets = {name: (text, build(config)) for name, (text, config) in PRESETS.items()}
    return _parse(None, args, command, presets=presets)


def _parse(kind: type | None, args: list[str], command: str, default: Any = None, presets: dict | None = None) -> Any:
    """tyro, with its error box folded into the one line that this command line promises."""
    errors = io.StringIO()
    prog = f"{PROG} {command}"
    try:
        with contextlib.redirect_stderr(errors):
            if presets is not None:
                return tyro.extras.overridable_config_cli(presets, args=args, prog=prog)
            kwargs = {} if default is None else {"default": default}
            return tyro.cli(kind, args=args, prog=prog, **kwargs)
    except SystemExit as ended:
        if not ended.code:
            raise
        raise InputError(_one_line(errors.getvalue(), prog)) from None


def _one_line(box: str, prog: str) -> str:
    """The first paragraph of tyro's box, without its frame, colours and title."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip(" │|") for line in plain.splitlines()]
    starts = [i + 1 for i, line in enumerate(lines) if re.match(r"^[╭+─-]", line)]
    first = list(itertools.takewhile(lambda line: not re.match(r"^[╰+─-]+", line), lines[starts[0] if starts else 0 :]))
    what = " ".join(first).rstrip(".")
    if what.startswith("Missing from"):
        what = "missing " + ", ".join(line.split()[0] for line in lines if line.startswith("--"))
    return f"{what}; see {prog} --help"
