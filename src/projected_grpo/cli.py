"""The command line: `projected-grpo COMMAND`, one function a command, heavy imports inside the functions.

Exit codes: 0 done, 2 bad arguments or bad input files (one line that says which and what to do), 130 interrupted,
1 anything else.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from projected_grpo import cli_bench, cli_env, cli_micro, cli_report, cli_sweep
from projected_grpo.cli_options import PROG, console, copy_fields, parse, take, with_preset
from projected_grpo.config import ArmName, BasisOptions, EvalConfig, ExtractConfig, TrainConfig
from projected_grpo.config_checks import at_least
from projected_grpo.errors import InputError, RunFault, RunInterrupted, is_disk_full
from projected_grpo.presets import preset_defaults
from projected_grpo.run_state import evaluation_of, held_out_of


def extract(args: list[str]) -> None:
    """Contrastive pairs to a basis file, or a control of one; prints its table."""
    config = with_preset(args, "extract", lambda preset: copy_fields(ExtractConfig, BasisOptions, preset))
    console()
    from projected_grpo.extract import extract

    extract(config)


@dataclass(frozen=True)
class TrainOptions(TrainConfig):
    dry_run: bool = False
    """Say how much memory, time and disk the run will take, and train nothing; neither the GPU nor the model's weights
    need be there."""


def train(args: list[str]) -> None:
    """One arm, one seed: a run's folder under out/runs. `--config FILE` repeats or resumes a run."""
    source, rest = take(args, "--config")

    def options_of(config: TrainConfig) -> TrainOptions:
        return copy_fields(TrainOptions, TrainConfig, config)

    if source is not None:
        saved = options_of(replace(TrainConfig.from_file(Path(source)), resume=False))
        options = parse(TrainOptions, rest, "train --config FILE", default=saved)
    else:
        options = with_preset(args, "train", options_of)
    config = copy_fields(TrainConfig, TrainConfig, options)
    console()
    if options.dry_run:
        from projected_grpo.dry_run import dry_run

        print(dry_run(config))
        return
    from projected_grpo.run import train

    train(config)


def evaluate(args: list[str]) -> None:
    """Hack, attempt and pass rates on held-out problems. `--run FOLDER` evaluates a finished run."""
    source, rest = take(args, "--run")
    if source is not None:
        folder = Path(source)
        run = TrainConfig.from_file(folder / "config.json")
        default = evaluation_of(run, folder)
        config = parse(EvalConfig, rest, "eval --run FOLDER", default=default)
    else:
        skip = {"problems", "modes"}
        config = with_preset(
            args,
            "eval",
            lambda preset: replace(
                copy_fields(EvalConfig, EvalConfig, preset, skip), problems=held_out_of(preset.problems)
            ),
        )
    console()
    from projected_grpo.evaluate import evaluate

    evaluate(config)


@dataclass(frozen=True)
class SteerOptions:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of finished runs."""
    basis: Path
    """Along which δ is moved: a real basis of the runs' model, or a control of one; `{seed}` is the run's seed."""
    at: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)
    """Values that V δ is set to, along every axis; each run is evaluated as it is, too."""
    samples: int = 4
    """Completions per problem and mode."""
    out: Path = Path("out/steer.json")
    """The file to write; a plot goes beside it."""
    overwrite: bool = False
    """Replace `--out` where it exists."""


def steer(args: list[str]) -> None:
    """Finished runs sampled again with δ moved along a basis: what V δ alone does to hack and pass rates."""
    options = parse(SteerOptions, args, "steer")
    if not options.runs:
        raise InputError("steer needs RUNS: folders of finished runs")
    at_least(options, "samples", 1)
    console()
    from projected_grpo.steer import steer

    print(steer(options.runs, options.basis, options.at, options.samples, options.out, options.overwrite))
    print(f"wrote {options.out} and {options.out.with_suffix('.png')}")


@dataclass(frozen=True)
class ExportOptions:
    run: tyro.conf.Positional[Path]
    """Folder of a finished run."""
    out: Path
    """The folder to write."""
    merged: bool = False
    """The whole model, δ merged into its weights, which plain transformers loads; by default the adapter alone."""
    push_to_hub: str | None = None
    """Then upload it to this repository of the hub (org/name), with the token that `hf auth login` has left."""
    public: bool = False
    """Where the repository is new: for everybody to see."""
    overwrite: bool = False
    """Replace `--out` where it exists."""


def export(args: list[str]) -> None:
    """A finished run for others: its adapter or its merged model, with a card that says what it does."""
    options = parse(ExportOptions, args, "export")
    console()
    from projected_grpo.export import export

    export(options.run, options.out, options.merged, options.overwrite, options.push_to_hub, options.public)


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
    options = parse(SmokeOptions, args, "smoke")
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
    "steer": steer,
    "export": export,
    "smoke": smoke,
    **cli_micro.COMMANDS,
    **cli_sweep.COMMANDS,
    **cli_env.COMMANDS,
    **cli_report.COMMANDS,
    **cli_bench.COMMANDS,
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
    except OSError as error:
        if not is_disk_full(error):
            raise
        where = f" for {error.filename}" if error.filename else ""
        print(
            f"stopped: the disk is full, no space left{where}; free some and give the same command again",
            file=sys.stderr,
        )
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

    console()
    logger.info(f"$ {PROG} {' '.join(args)}")
    _dispatch(list(args))


def _help() -> str:
    lines = [f"usage: {PROG} COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<16}  {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", f"`{PROG} COMMAND --help` tells the options of a command."])
