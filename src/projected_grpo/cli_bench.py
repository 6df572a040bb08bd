"""The `bench` commands: each thing against its peer, in turn, in one process."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from projected_grpo.cli_options import console, copy_fields, parse, take, with_preset
from projected_grpo.config import BasisOptions, TrainConfig
from projected_grpo.config_checks import at_least
from projected_grpo.errors import InputError
from projected_grpo.paths import check_out
from projected_grpo.presets import preset_defaults

if TYPE_CHECKING:
    from projected_grpo.bench.timing import Timings


def _positive(options: object, *names: str) -> None:
    for name in names:
        at_least(options, name, 1)


def _report(timings: "Timings", out: Path) -> None:
    print(timings.table())
    timings.save(out)
    print(f"  wrote {out}")


def _file(out: Path | None, name: str, overwrite: bool) -> Path:
    """Where the numbers go; refused before anything is measured."""
    out = out or Path("out", "bench", f"{name}-{datetime.now():%Y%m%d-%H%M%S}.json")
    check_out(out, overwrite)
    return out


@dataclass(frozen=True)
class FileOptions:
    out: Path | None = None
    """File for all numbers, as JSON; out/bench/NAME-DATE-TIME.json by default."""
    overwrite: bool = False
    """Replace `--out` where it exists."""


@dataclass(frozen=True)
class BenchOptions(FileOptions):
    rounds: int = 20
    """Timings of each case, in turn."""
    device: str | None = None
    """Torch device; the first GPU where there is one, else the CPU."""

    def __post_init__(self) -> None:
        _positive(self, "rounds")


@dataclass(frozen=True)
class LayerOptions(BenchOptions):
    d_out: int = 1024
    """Rows of the weight."""
    d_in: int = 1024
    """Columns of the weight."""
    tokens: int = 4096
    """Of one forward, all rows together."""
    micro_batches: int = 4
    """Forwards and backwards of one step."""
    rows: int = 8
    """Sequences."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weight and input."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "d_out", "d_in", "tokens", "micro_batches", "rows")
        if self.tokens % self.rows:
            raise InputError(f"--tokens {self.tokens} is no multiple of --rows {self.rows}")


def layer(args: list[str]) -> None:
    """A linear layer, forward and backward: frozen, with LoRA, with delta_S plain and merged."""
    options = parse(LayerOptions, args, "bench layer")
    out = _file(options.out, "layer", options.overwrite)
    console()
    import torch

    from projected_grpo.bench.layer import bench_layer
    from projected_grpo.models import device_of

    dtype, device = getattr(torch, options.dtype), torch.device(device_of(options.device))
    shape = options.d_out, options.d_in, options.rows, options.tokens, options.micro_batches
    _report(bench_layer(*shape, dtype, device, options.rounds), out)


@dataclass(frozen=True)
class SvdOptions(BenchOptions):
    rounds: int = 5
    """Timings of each route, in turn."""
    d_out: int = 1536
    """Rows of the weight."""
    d_in: int = 576
    """Columns of the weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "d_out", "d_in")


def svd(args: list[str]) -> None:
    """The decomposition of a weight: torch.linalg.svd and the route by the Gram matrix, and their errors."""
    options = parse(SvdOptions, args, "bench svd")
    out = _file(options.out, "svd", options.overwrite)
    console()
    import torch

    from projected_grpo.bench.decomposition import bench_svd
    from projected_grpo.models import device_of

    device = torch.device(device_of(options.device))
    _report(bench_svd(options.d_out, options.d_in, device, options.rounds), out)


def _rounds_and_out(args: list[str], name: str, rounds: int) -> tuple[int, Path, list[str]]:
    """`--rounds` and `--out`, which a preset's own options do not have."""
    given, args = take(args, "--rounds")
    out, args = take(args, "--out")
    if given is not None and not (given.isascii() and given.isdecimal() and int(given) >= 1):
        raise InputError(f"--rounds {given} must be a number of at least 1")
    overwrite = "--overwrite" in args
    args = [arg for arg in args if arg != "--overwrite"]
    return int(given or rounds), _file(Path(out) if out else None, name, overwrite), args


_OF_A_RUN = (
    *("arm", "label", "exploratory", "out_root", "overwrite", "resume", "basis"),
    *("steps", "save_every", "rollout_grad_every", "vhack_refresh_every"),
)


def _refuse_ignored(config: TrainConfig, command: str, names: tuple[str, ...]) -> None:
    """What the command sets itself must not look as if it could be set."""
    usual = replace(preset_defaults(config.preset), mix_ratio=0.0, teacher_pool=None)
    for name in names:
        if getattr(config, name) != getattr(usual, name):
            raise InputError(f"--{name.replace('_', '-')} is set by {command} itself; leave it out")


def step(args: list[str]) -> None:
    """One optimiser step of ours against stock TRL with LoRA. `bench step PRESET [--rounds N] [--out FILE] ...`"""
    rounds, out, args = _rounds_and_out(args, "step", 5)
    config = with_preset(args, "bench step", lambda preset: replace(preset, mix_ratio=0.0, teacher_pool=None))
    _refuse_ignored(config, "bench step", (*_OF_A_RUN, "mix_ratio", "teacher_pool"))
    console()
    from projected_grpo.bench.step import bench_step

    _report(bench_step(config, rounds), out)


def generation(args: list[str]) -> None:
    """A step's generation with a growing and a static cache. `bench generation PRESET [--rounds N] [--out FILE] ...`"""
    rounds, out, args = _rounds_and_out(args, "generation", 3)
    config = with_preset(args, "bench generation", lambda preset: preset)
    _refuse_ignored(config, "bench generation", (*_OF_A_RUN, "static_cache"))
    console()
    from projected_grpo.bench.generation import bench_generation

    _report(bench_generation(config, rounds), out)


def extract(args: list[str]) -> None:
    """The pairs' gradients in batches, against a backward for each side. `bench extract PRESET [--rounds N] ...`"""
    rounds, out, args = _rounds_and_out(args, "extract", 3)
    config = with_preset(args, "bench extract", lambda preset: copy_fields(BasisOptions, BasisOptions, preset))
    if config.token_reduction != "sum":
        raise InputError("bench extract compares sums over tokens; leave --token-reduction out")
    console()
    from peft import get_peft_model

    from projected_grpo.adapter import DeltaSConfig
    from projected_grpo.bench.extraction import bench_extract
    from projected_grpo.extract import PairBases, pairs_of
    from projected_grpo.models import load_model
    from projected_grpo.prompting import Prompter

    loaded = load_model(config.model, config.dtype, config.device)
    bases = PairBases(get_peft_model(loaded.model, DeltaSConfig()), Prompter(loaded), config)
    about = {"model": config.model, "dtype": config.dtype}
    encoded = bases.encoded(pairs_of(config))
    _report(bench_extract(bases.model, encoded, config, rounds, about), out)


@dataclass(frozen=True)
class GraderOptions(FileOptions):
    problems: tuple[str, ...] = ("train", "eval")
    """Built-in parts or files whose canonical solutions are timed."""
    workers: int = 2
    """On both sides, for completions per second."""
    repeats: int = 5
    """Timings of each row on each side, in turn."""
    rounds: int = 5
    """Pairs of batches."""


def grader(args: list[str]) -> None:
    """The grader's overhead and throughput against a fresh interpreter for each completion, in one run."""
    options = parse(GraderOptions, args, "bench grader")
    _positive(options, "workers", "repeats", "rounds")
    out = _file(options.out, "grader", options.overwrite)
    console()
    from projected_grpo.bench.grader import format_report, measure, save_report
    from projected_grpo.sources import problems_of

    problems = [problem for source in options.problems for problem in problems_of(source)]
    if not problems:
        raise InputError("--problems names nothing; leave it out for our own problems")
    if len({problem.id for problem in problems}) < len(problems):
        raise InputError("--problems names files with the same ids; time them apart")
    if without := [problem.id for problem in problems if not problem.canonical_solution]:
        raise InputError(f"problem {without[0]} has no canonical solution to time ({len(without)} such)")
    report = measure(problems, options.workers, options.repeats, options.rounds)
    print(format_report(report))
    save_report(report, out)
    print(f"wrote {out}")


COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "bench layer": layer,
    "bench step": step,
    "bench extract": extract,
    "bench generation": generation,
    "bench svd": svd,
    "bench grader": grader,
}
