"""The command that does many runs at once."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro

from projected_grpo.cli_options import PROG, console, parse
from projected_grpo.errors import InputError


@dataclass(frozen=True)
class SweepOptions:
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
    jobs: int | None = None
    """Runs at a time; by default one for each core, or 1 where a GPU may be used."""
    out_root: Path | None = None
    """Runs go to `{out_root}/{preset}`; the file's, or out/runs, by default."""
    dry_run: bool = False
    """Say what would be done with each run, and do nothing."""


def sweep(args: list[str]) -> None:
    """Arms x seeds, as many runs at once as there are cores; skips what is done and resumes the rest."""
    options = parse(SweepOptions, args, "sweep")
    if options.jobs is not None and options.jobs < 1:
        raise InputError(f"--jobs {options.jobs} must be at least 1")
    seeds = [_seed(word) for word in _words(options.seeds)]
    console()
    from projected_grpo.sweep import sweep
    from projected_grpo.sweep_file import read_sweep, sweep_of

    if options.file is not None:
        for name in ("preset", "arms", "problems", "teacher_pool"):
            if getattr(options, name):
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} goes with --preset, not with the sweep file {options.file}; write it there")
        plan = read_sweep(options.file, seeds or None, options.out_root)
    elif options.preset is None:
        raise InputError("sweep needs a FILE, or --preset with --arms and --seeds; see projected-grpo sweep --help")
    else:
        arms = _words(options.arms)
        plan = sweep_of(options.preset, arms, seeds, options.out_root, options.problems, options.teacher_pool)
    sweep(plan, options.jobs, options.dry_run, again=f"`{PROG} sweep {shlex.join(args)}`")


def _words(given: tuple[str, ...]) -> list[str]:
    return [word for text in given for word in re.split(r"[,\s]+", text) if word]


def _seed(word: str) -> int:
    if not re.fullmatch(r"[0-9]+", word):
        raise InputError(f"--seeds {word!r} is no whole number; give them as --seeds 41,42,43")
    return int(word)


COMMANDS = {"sweep": sweep}
