"""What a run will take, before anything is loaded: memory (memory.py), time and disk; `train --dry-run`.

Time is a rough figure. The arithmetic of a step is counted (docs/performance.md), and divided by what this machine's
matrix products reach, or one H200's where the GPU asked for is not here; to it comes what transformers' generation
spends on every token and layer however small the model is. Every completion counts as long as it may become. A compiled
step spends less on each; its figure holds what attention takes at `full`'s rows and lengths, and is too high for fewer.
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from projected_grpo import processes
from projected_grpo.config import TrainConfig
from projected_grpo.errors import InputError
from projected_grpo.memory import GB, Sizes, forecast
from projected_grpo.paths import cache_dir, existing

TOKEN_LAYER_S = 3.2e-3
"""Of generation, for each token and layer: 115 ms a token for the 36 layers of preset `full` on an H200, 5 ms for two
of `micro` on a CPU (docs/performance.md)."""
COMPILED_TOKEN_LAYER_S = 0.7e-3
"""The same where the step is compiled (`--static-cache` on a GPU): of 31 ms a token at `full` on an H200, what is no
arithmetic."""
H200_UPDATE = 2.5e14
"""Multiplications and additions a second that the update of preset `full` reached on one H200."""
OF_A_PRODUCT = {"cuda": 0.35, "cpu": 0.5}
"""The share of a bare matrix product's rate that an update reaches: assumed, from H200_UPDATE beside that card's data
sheet, and from `smol` on a CPU."""
TEXT_BYTES = 1.2
"""Of a rollout's token in the compressed file."""
OF_CHECKPOINT, OF_ADAPTER, OF_MODULE = 40_000, 12_000, 1000
"""Bytes beside the numbers: settings, generators' states and the card; names and fingerprints of each module."""
ROW_BYTES = 2500
"""Of a row of metrics.jsonl, and its line in train.log."""


@dataclass(frozen=True)
class Time:
    """Seconds of a step, by part, and by what rate (operations a second) they were reckoned."""

    generation: float
    update: float
    rate: float
    of: str

    @property
    def step(self) -> float:
        return self.generation + self.update


def dry_run(config: TrainConfig) -> str:
    """The three of them, for people. Raises InputError as `forecast` does, and for what it does not reckon with."""
    if config.vllm != "off":
        raise InputError(
            "--dry-run knows nothing of vLLM's memory and time; leave --vllm out, and add vLLM's own share"
        )
    if processes.world_size() > 1:
        raise InputError("--dry-run is for one process; start it without a launcher, with one process's --micro-batch")
    found = forecast(config)
    taken = time_of(config, found.sizes, found.about["device"])
    hours = taken.step * config.steps / 3600
    lines = [
        found.table(),
        "",
        f"time, roughly: {taken.step:.3g} s a step (generation {taken.generation:.3g}, update {taken.update:.3g}), "
        f"{_long(hours)} for {config.steps} steps; at most, as completions may end early",
        f"  reckoned with {taken.rate / 1e12:.3g} TFLOP/s: {taken.of}",
        *_disk_lines(config, disk_of(config, found.sizes)),
    ]
    return "\n".join(lines)


def time_of(config: TrainConfig, sizes: Sizes, device: str) -> Time:
    """Of one step without its first costs, measurement of single rollouts or a refresh."""
    rows = config.prompts_per_step * config.group_size
    students = config.prompts_per_step * (config.group_size - config.num_teacher)
    prompt, completion = sizes.prompt, config.max_completion_length
    rate, of = _rate(device, config.dtype)
    sampled = 2 * sizes.parameters * students * (prompt + completion)
    # Forward and dL/dx, and again under checkpointing; the reference's forward, and the old policy's; δ's gradient.
    reused = config.num_iterations > 1 or config.steps_per_generation > 1
    passes = 4 + 2 * config.gradient_checkpointing + 2 * bool(config.beta) + 2 * reused
    trained = rows * ((prompt + completion) * (passes + 2) * sizes.adapted + completion * passes * sizes.head)
    generations = 1 / config.num_iterations
    compiled = config.static_cache and torch.device(device).type == "cuda"
    each = COMPILED_TOKEN_LAYER_S if compiled else TOKEN_LAYER_S
    generation = each * sizes.layers * completion + sampled / rate
    return Time(generation * generations, trained / rate, rate, of)


def _rate(device: str, dtype: str) -> tuple[float, str]:
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        return H200_UPDATE, "what preset full reached on one H200 (docs/performance.md); that GPU is not here"
    size = 8192 if kind == "cuda" else 1024
    x = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    best = float("inf")
    for _ in range(5):
        if kind == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        x @ x
        if kind == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    share = OF_A_PRODUCT[kind]
    return share * 2 * size**3 / best, f"{share:.0%} of what a product of {size} x {size} reaches here, in {dtype}"


@dataclass(frozen=True)
class Disk:
    """Bytes, by what they are, and where they go."""

    run: dict[str, int]
    cache: dict[str, int]


def disk_of(config: TrainConfig, sizes: Sizes) -> Disk:
    """Of the run's folder at its end, and of the caches that it shares with others, where they are not there yet."""
    delta = 4 * sizes.delta
    basis = delta * (min(config.v_hack_k, sizes.pairs) + 1)
    n_checkpoints = -(-config.steps // config.save_every)
    rows = config.steps * config.prompts_per_step * config.group_size
    run = {
        f"{n_checkpoints} checkpoints": n_checkpoints
        * (3 * delta + basis + sizes.tokenizer + OF_CHECKPOINT + 2 * OF_MODULE * sizes.modules),
        "adapter, basis": delta + basis + sizes.tokenizer + OF_ADAPTER + OF_MODULE * sizes.modules,
        "rollouts": int(rows * config.max_completion_length * TEXT_BYTES / config.num_iterations),
        "metrics, log": config.steps * ROW_BYTES,
    }
    return Disk(run, {"decompositions": sizes.factors, "model": sizes.weights})


def _disk_lines(config: TrainConfig, disk: Disk) -> list[str]:
    lines = []
    for what, parts, place in (
        ("disk, at most", disk.run, config.run_dir),
        ("caches, once for a model", disk.cache, Path(os.environ.get("HF_HOME", cache_dir()))),
    ):
        free = shutil.disk_usage(existing(place)).free
        named = ", ".join(f"{name} {size / GB:.2g}" for name, size in parts.items())
        total = sum(parts.values())
        short = "" if total < free else "; THAT IS TOO LITTLE"
        lines.append(f"{what}: {total / GB:.2g} GB ({named}) in {place}, where {free / GB:.3g} are free{short}")
    return lines


def _long(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
