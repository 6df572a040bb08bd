"""The command that does many runs at once."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from projected_grpo.cli_options import PROG, console, parse
from projected_grpo.config_checks import at_least
from projected_grpo.errors import InputError

if TYPE_CHECKING:
    from projected_grpo.sweep_file import Sweep


@dataclass(frozen=True)
class PlanOptions:
    file: tyro.conf.Positional[Path | None] = None
    """A sweep file (see sweeps/); without it give --preset, --arms and --seeds."""
    preset: str | None = None
    """The preset of every run."""
    arms: tuple[str, ...] = ()
    """Arms, by comma or space."""
    seeds: tuple[str, ...] = ()
    """Seeds, by comma or space; in place of the file's where there is one."""
    problems: str | None = None
    """Training problems of every run; the preset's by default."""
    teacher_pool: Path | None = None
    """Teacher pool of every run, built from templates where it is not there; the preset's by default."""
    out_root: Path | None = None
    """Runs go to `{out_root}/{preset}`; the file's, or out/runs, by default."""


@dataclass(frozen=True)
class SweepOptions(PlanOptions):
    jobs: int | None = None
    """Runs at a time; by default one for each core, 1 where a GPU may be used, and all of them on Slurm."""
    launcher: Literal["local", "slurm"] = "local"
    """Processes of this machine, or jobs of the Slurm cluster that it belongs to."""
    slurm: tuple[str, ...] = ()
    """KEY=VALUE of each job's sbatch file, by submitit's names: partition=gpu time=240 gpus_per_node=1 cpus_per_task=8
    mem=64GB (time in minutes)."""
    dry_run: bool = False
    """Say what would be done with each run, and do nothing."""


def sweep(args: list[str]) -> None:
    """Arms x seeds, as many runs at once as there are cores, or on Slurm; skips what is done and resumes the rest."""
    options = parse(SweepOptions, args, "sweep")
    if options.jobs is not None and options.jobs < 1:
        raise InputError(f"--jobs {options.jobs} must be at least 1")
    if options.slurm and options.launcher != "slurm":
        raise InputError(f"--slurm {options.slurm[0]} goes with --launcher slurm; add it or leave this out")
    slurm = dict(map(_setting, options.slurm)) if options.launcher == "slurm" else None
    console()
    from projected_grpo.sweep import sweep

    again = f"`{PROG} sweep {shlex.join(args)}`"
    sweep(_plan(options, "sweep"), options.jobs, options.dry_run, again, slurm)


@dataclass(frozen=True)
class StatusOptions(PlanOptions):
    every: float = 0.0
    """Seconds between two tables, until all is done; 0 prints one."""


def status(args: list[str]) -> None:
    """How far each run of a sweep has come, wherever it runs: step, time left, last hack and pass rates."""
    options = parse(StatusOptions, args, "sweep status")
    at_least(options, "every", 0)
    plan = _plan(options, "sweep status")
    from projected_grpo.sweep_watch import show_status

    show_status(plan, options.every)


def _plan(options: PlanOptions, command: str) -> "Sweep":
    seeds = [_seed(word) for word in _words(options.seeds)]
    from projected_grpo.sweep_file import read_sweep, sweep_of

    if options.file is not None:
        for name in ("preset", "arms", "problems", "teacher_pool"):
            if getattr(options, name):
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} goes with --preset, not with the sweep file {options.file}; write it there")
        return read_sweep(options.file, seeds or None, options.out_root)
    if options.preset is None:
        raise InputError(f"{command} needs a FILE, or --preset with --arms and --seeds; see {PROG} {command} --help")
    arms = _words(options.arms)
    return sweep_of(options.preset, arms, seeds, options.out_root, options.problems, options.teacher_pool)


def _words(given: tuple[str, ...]) -> list[str]:
    return [word for text in given for word in re.split(r"[,\s]+", text) if word]


def _setting(word: str) -> tuple[str, str | int]:
    key, equals, value = word.partition("=")
    if not (key and equals and value):
        raise InputError(f"--slurm {word!r} is not KEY=VALUE; give them as --slurm partition=gpu time=240")
    return key, int(value) if value.isdecimal() else value


def _seed(word: str) -> int:
    if not re.fullmatch(r"[0-9]+", word):
        raise InputError(f"--seeds {word!r} is no whole number; give them as --seeds 41,42,43")
    return int(word)


COMMANDS = {"sweep": sweep, "sweep status": status}
