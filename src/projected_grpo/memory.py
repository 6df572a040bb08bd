"""The most memory that a run will hold, before anything is loaded: `train --dry-run`.

What is kept is counted: weights, factors, W', keys and values, δ with its optimiser state. What the backward keeps is
measured, on a model without numbers (PyTorch's meta device), as the bytes of all distinct tensors that a forward saves:
for any decoder of transformers whose attention can be exchanged. What a single operation takes while it runs is
reckoned for the two large ones, the log-probabilities over the vocabulary and the widest layer's gradients.

Counted are tensors. An allocator holds more, in pieces, and a CUDA context comes on top; on a CPU the interpreter and
the libraries are counted in as this process holds them now (docs/performance.md has both against real runs).
"""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as VOCAB_CHUNK_SIZE

from projected_grpo.basis import check_top_k
from projected_grpo.config import TrainConfig
from projected_grpo.encoding import encode_prompt
from projected_grpo.errors import InputError
from projected_grpo.extract import pairs_of, placebos_of
from projected_grpo.models import device_of, load_skeleton
from projected_grpo.pair_gradients import BatchShape, batch_shapes, encode_pairs
from projected_grpo.prompting import Prompter
from projected_grpo.run import check_enough
from projected_grpo.saved_tensors import Mask, saved_bytes
from projected_grpo.sources import assign_modes, problems_of

GB = 1e9
_FLOAT = 4
"""Bytes of a float32, in which δ, its factors and every statistic are kept."""


@dataclass(frozen=True)
class Sizes:
    """Of a model and its run: numbers, but where bytes are said."""

    parameters: int
    adapted: int
    """Of the layers that δ steers, which is all but the embedding and the LM head."""
    delta: int
    modules: int
    layers: int
    head: int
    weights: int
    """Bytes."""
    factors: int
    """Bytes."""
    prompt: int
    """Tokens of the longest."""
    pairs: int
    tokenizer: int
    """Bytes of its files, which are in every checkpoint."""


@dataclass(frozen=True)
class Forecast:
    """Bytes of each component in each phase of a run, all of them held at once at the phase's worst moment."""

    about: dict[str, str]
    sizes: Sizes
    phases: dict[str, dict[str, int]]
    host: dict[str, int]
    """What lies in host memory while a GPU trains; empty for a CPU."""
    loading: int = 0
    """What lies there while the model is made ready for a GPU: its weights, and the factors of all modules at once."""

    def total(self, phase: str) -> int:
        """Bytes of a phase."""
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> int:
        """Bytes of the worst phase."""
        return max(map(self.total, self.phases))

    def table(self) -> str:
        """GB of each component by phase."""
        names = list(dict.fromkeys(name for parts in self.phases.values() for name in parts))
        width, worst = max(map(len, names)), max(self.phases, key=self.total)
        lines = ["  ".join(f"{key} {value}" for key, value in self.about.items())]
        lines += [f"  {'GB':{width}}" + "".join(f"{phase:>14}" for phase in self.phases)]
        for name in names:
            cells = (parts.get(name) for parts in self.phases.values())
            lines.append(
                f"  {name:{width}}" + "".join(f"{'-' if cell is None else f'{cell / GB:.2f}':>14}" for cell in cells)
            )
        lines.append(f"  {'together':{width}}" + "".join(f"{self.total(p) / GB:>14.2f}" for p in self.phases))
        lines.append(f"predicted peak: {self.peak / GB:.2f} GB in {worst}")
        if self.host:
            held = ", ".join(f"{name} {size / GB:.1f}" for name, size in self.host.items())
            lines.append("the allocator's pieces and CUDA's own context come on top (memory/reserved_gb of a run)")
            training = sum(self.host.values())
            lines.append(
                f"in host memory: {self.loading / GB:.1f} GB while loading, {training / GB:.1f} while training ({held})"
            )
        else:
            lines.append("resident is more: the C allocator keeps pieces of what was freed (docs/performance.md)")
        return "\n".join(lines)


def forecast(config: TrainConfig) -> Forecast:
    """Of a run of `config` on its device, a GPU that need not be there or a CPU.

    A completion counts as long as it may become, and a step's prompts as long as the longest, so that a run whose
    completions end early stays below. Raises InputError for a device, model, problems or pairs that cannot be used.
    """
    device = _device(config.device)
    pairs = [pairs_of(config)]
    check_top_k(config.v_hack_k, len(pairs[0]))
    if config.arm.startswith("placebo_"):
        pairs.append(placebos_of(config, config.arm.removeprefix("placebo_")))
    loaded = load_skeleton(config.model, config.dtype)
    shape = _Shape(loaded.model, config, on_gpu=device.type == "cuda")
    prompter = Prompter(loaded, config.max_prompt_length, config.wording)
    problems = problems_of(config.problems)
    check_enough(config, problems)
    prompt = max(
        len(encode_prompt(loaded.tokenizer, prompter.row(problem, mode)["prompt"], prompter.template_kwargs))
        for problem, mode in zip(problems, assign_modes(problems, config.modes), strict=True)
    )
    batches = [
        batch
        for chosen in pairs
        for batch in batch_shapes(
            loaded.model,
            encode_pairs(
                loaded.model,
                loaded.tokenizer,
                prompter.pairs(chosen).pairs,
                prompter.template_kwargs,
                config.max_prompt_length,
            ),
            shape.n_adapted,
        )
    ]
    resting = shape.resting(len(pairs[0]))
    phases = {
        "decomposition": shape.decomposition(),
        "extraction": resting | shape.extraction(batches, len(pairs[0])),
        "generation": resting | shape.generation(prompt, config.max_completion_length),
        "update": resting | shape.update(prompt, config.max_completion_length),
    }
    if config.basis is not None and not config.vhack_refresh_every and len(pairs) == 1:
        del phases["extraction"]  # the file has it
    host = {}
    if shape.on_gpu:
        # D, and its singular vectors in float64.
        host["pair gradients"] = 3 * len(pairs[0]) * shape.n_delta * _FLOAT
        if config.offload:
            host |= shape.pinned()
            phases["generation"] = {k: v for k, v in phases["generation"].items() if k not in ("factors", "merged")}
    else:
        libraries = psutil.Process().memory_info().rss
        phases = {name: {"libraries": libraries, **parts} for name, parts in phases.items()}
    about = {
        "model": config.model,
        "dtype": config.dtype,
        "device": str(device),
        "parameters": f"{shape.n_parameters / 1e6:.1f} M",
        "longest prompt": str(prompt),
        "completion": str(config.max_completion_length),
    }
    text = loaded.model.config.get_text_config()
    sizes = Sizes(
        parameters=shape.n_parameters,
        adapted=shape.n_adapted,
        delta=shape.n_delta,
        modules=len(shape.linears),
        layers=text.num_hidden_layers,
        head=shape.vocabulary * shape.hidden,
        weights=shape.weights,
        factors=shape.factors,
        prompt=prompt,
        pairs=len(pairs[0]),
        tokenizer=_saved_size(loaded.tokenizer),
    )
    return Forecast(about, sizes, phases, host, shape.factors + shape.weights if shape.on_gpu else 0)


def _saved_size(tokenizer: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _device(name: str | None) -> torch.device:
    """A CPU or a GPU, which need not be there."""
    if name is not None and re.fullmatch(r"cuda(:\d+)?", name):
        return torch.device(name)
    device = torch.device(device_of(name))
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: memory is foretold for cpu and cuda; leave --dry-run out")
    return device


class _Shape:
    """Sizes of a model without numbers, in bytes where nothing else is said."""

    def __init__(self, model: Any, config: TrainConfig, on_gpu: bool) -> None:
        self.model, self.config, self.on_gpu = model.requires_grad_(False), config, on_gpu
        self.item = model.dtype.itemsize
        head = model.get_output_embeddings()
        if head is None:
            raise InputError(f"model {config.model!r} has no LM head, so it cannot be trained here; name a causal LM")
        self.linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
        self.sizes = sizes = [(max(linear.weight.shape), min(linear.weight.shape)) for linear in self.linears]
        if not sizes:
            raise InputError(
                f"model {config.model!r} has no linear layer beside its LM head, so there is nothing to adapt"
            )
        self.vocabulary, self.hidden = head.weight.shape
        self.n_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.n_adapted = sum(large * small for large, small in sizes)
        self.n_delta = sum(small for _, small in sizes)
        self.weights, self.adapted = self.n_parameters * self.item, self.n_adapted * self.item
        self.factors = sum((large + small) * small for large, small in sizes) * _FLOAT
        self.widest = max(large for large, _ in sizes)

    def resting(self, n_pairs: int) -> dict[str, int]:
        """What is there from the first step to the last."""
        of_delta = 7  # δ, its gradient, that of both sources, two moments, the value that W' was made of
        # V, the pairs' coefficients and the spectrum are smaller than the gradients that they came from.
        kept = (of_delta + 2 * min(self.config.v_hack_k, n_pairs)) * self.n_delta * _FLOAT
        return {"weights": self.weights, "factors": self.factors, "merged": self.adapted, "delta, optimiser, V": kept}

    def decomposition(self) -> dict[str, int]:
        """In float64, as many weights at a time as there are threads; on a GPU one."""
        threads = 1 if self.on_gpu else torch.get_num_threads()
        # W and its long factor; the square ones and LAPACK's own.
        one = max(2 * large * small + 6 * small**2 for large, small in self.sizes)
        factors = 0 if self.on_gpu else self.factors
        return {"weights": self.weights, "factors": factors, "at work": threads * one * 8}

    def pinned(self) -> dict[str, int]:
        """What `offload` puts into pinned host memory, which PyTorch gives out in powers of two."""

        def block(size: int) -> int:
            return 1 << (size - 1).bit_length()

        factors = sum(block(large * small * _FLOAT) + block(small**2 * _FLOAT) for large, small in self.sizes)
        weights = sum(block(large * small * self.item) for large, small in self.sizes)
        return {"factors": factors, "weights while generating": weights}

    def extraction(self, batches: Sequence[BatchShape], n_pairs: int) -> dict[str, int]:
        """The worst batch of pairs: that of most tokens, of most logits, or of most tokens in a side."""
        worst = {
            max(batches, key=of) for of in (lambda b: b.rows * b.width, lambda b: b.rows * b.kept, lambda b: b.scored)
        }
        parts = max((self._pairs(batch) for batch in worst), key=lambda parts: sum(parts.values()))
        return parts | {"pair gradients": n_pairs * self.n_delta * _FLOAT}

    def _pairs(self, batch: BatchShape) -> dict[str, int]:
        mask: Mask = "once" if batch.packed else "none"
        saved = saved_bytes(self.model, self.linears, batch.rows, batch.width, mask)
        logits = batch.rows * batch.kept * self.vocabulary * self.item
        wide = batch.scored * self.vocabulary * max(self.item, _FLOAT)
        work = self._backward(batch.rows * batch.width, groups=batch.rows, by_row=True)
        return {"activations": saved.together, "logits": logits + 3 * wide, "at work": work}

    def generation(self, prompt: int, completion: int) -> dict[str, int]:
        """All rows that are sampled at once."""
        config, text = self.config, self.model.config.get_text_config()
        per_prompt = config.group_size - config.num_teacher
        rows = config.prompts_per_step * config.steps_per_generation * per_prompt
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        one = rows * (prompt + completion) * heads * width * self.item
        cache = 2 * text.num_hidden_layers * one
        # Logits and their copies in float32, sorted with their places (8 bytes each) for the nucleus.
        sampling = rows * self.vocabulary * (5 * _FLOAT + 8)
        tokens = rows * prompt * self.item
        if config.static_cache:
            # The whole cache is there while the prompts are read, and keys and values are copied for each query head;
            # beside them the queries, turned and not, the output, and what goes around the layer.
            groups = text.num_attention_heads // heads
            attention = 2 * groups * one * (groups > 1) + tokens * (3 * text.num_attention_heads * width)
            prefill = max(attention, tokens * 3 * self.widest) + tokens * 2 * self.hidden
            work = max(prefill, sampling)
            return {"keys and values": cache, "at work": work}
        prefill = 3 * tokens * max(self.widest, self.hidden)
        return {"keys and values": cache, "logits": sampling, "at work": max(prefill, 2 * one)}

    def update(self, prompt: int, completion: int) -> dict[str, int]:
        """One micro-batch, forward and backward."""
        config = self.config
        rows, width = config.micro_batch, prompt + completion
        groups = 2 if config.num_teacher else 1
        saved = saved_bytes(self.model, self.linears, rows, width, "each")
        scored = rows * completion if self.on_gpu else rows * (width - 1)
        # TRL's kernel works in place; without it eight tiles of float32 are there at the worst moment of the backward.
        if self.on_gpu:
            tiles = min(scored, TOKEN_CHUNK_SIZE) * VOCAB_CHUNK_SIZE * self.item
        else:
            tiles = min(scored, TOKEN_CHUNK_SIZE) * min(self.vocabulary, VOCAB_CHUNK_SIZE) * 8 * _FLOAT
        logits = tiles + scored * self.hidden * (2 * _FLOAT)
        micro_batches = config.prompts_per_step * config.group_size // config.micro_batch
        deferred = {}
        if micro_batches > 1 and config.defer_budget_gb:
            pays = [a * b for a, b in self.sizes if rows * width * micro_batches >= groups * a]
            deferred = {"deferred gradients": int(min(groups * sum(pays) * _FLOAT, config.defer_budget_gb * GB))}
        by_row = bool(config.rollout_grad_every)
        work = max(
            self._backward(rows * width, groups, by_row=False), by_row * self._backward(rows * width, rows, by_row)
        )
        if not config.gradient_checkpointing:
            return deferred | {"activations": saved.together, "logits": logits, "at work": work}
        # A layer's activations are made again once the logits are gone.
        moments = (
            {"activations": saved.inputs, "logits": logits},
            {"activations": saved.inputs + saved.layer, "at work": work},
        )
        return deferred | max(moments, key=lambda parts: sum(parts.values()))

    def _backward(self, tokens: int, groups: int, by_row: bool) -> int:
        """The gradients in flight at the widest layer, and what dL/dδ is made from at the module that takes most."""

        def of_delta(large: int, small: int) -> int:
            if by_row or tokens < groups * large:
                return 3 * tokens * small * _FLOAT + (large + small) * small * (self.item if self.item < _FLOAT else 0)
            return large * small * (self.item + 2 * _FLOAT) + (tokens * (large + small) * self.item) * (groups > 1)

        return 3 * tokens * self.widest * self.item + max(of_delta(*size) for size in self.sizes)
