"""The most memory that a run will hold, before anything is loaded: `train --dry-run`.

What is kept is counted: weights, factors, W', keys and values, δ with its optimiser state. What the backward keeps is
measured, on a model without numbers (PyTorch's meta device), as the bytes of all distinct tensors that a forward saves,
so that it holds for every architecture that transformers has. What a single operation takes while it runs is reckoned
for the two large ones, the log-probabilities over the vocabulary and the widest layer's gradients.

Counted are tensors. An allocator holds more, in pieces, and a CUDA context comes on top; on a CPU the interpreter and
the libraries are counted in as this process holds them now.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as VOCAB_CHUNK_SIZE

from projected_grpo.config import TrainConfig
from projected_grpo.encoding import encode_prompt
from projected_grpo.models import device_of, load_skeleton
from projected_grpo.pair_gradients import batch_shapes, encode_pairs
from projected_grpo.prompting import Prompter
from projected_grpo.run import check_enough
from projected_grpo.sources import assign_modes, pairs_selected, problems_of

GB = 1e9
_FLOAT = 4
"""Bytes of a float32, in which δ, its factors and every statistic are kept."""


@dataclass(frozen=True)
class Forecast:
    """Bytes of each component in each phase of a run, all of them held at once at the phase's worst moment."""

    about: dict[str, str]
    phases: dict[str, dict[str, int]]
    host: dict[str, int]
    """What lies in host memory while a GPU runs; empty for a CPU."""

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
        lines.append(f"predicted peak: {self.peak / GB:.1f} GB, in {worst}")
        if self.host:
            held = ", ".join(f"{name} {size / GB:.1f}" for name, size in self.host.items())
            lines.append(f"in host memory meanwhile: {sum(self.host.values()) / GB:.1f} GB ({held})")
        else:
            lines.append("resident is more: the C allocator keeps pieces of what was freed, 5 to 35 % in four runs")
        return "\n".join(lines)


def forecast(config: TrainConfig) -> Forecast:
    """Of a run of `config` on its device.

    A completion counts as long as it may become, and a step's prompts as long as the longest, so that a run whose
    completions end early stays below. Raises InputError for problems, pairs or a model that the run would refuse.
    """
    device = torch.device(_device_wished(config.device))
    loaded = load_skeleton(config.model, config.dtype)
    shape = _Shape(loaded.model, config, on_gpu=device.type != "cpu")
    prompter = Prompter(loaded, config.max_prompt_length, config.wording)
    problems = problems_of(config.problems)
    check_enough(config, problems)
    prompt = max(
        len(encode_prompt(loaded.tokenizer, prompter.row(problem, mode)["prompt"], prompter.template_kwargs))
        for problem, mode in zip(problems, assign_modes(problems, config.modes), strict=True)
    )
    pairs = prompter.pairs(pairs_selected(config.pairs, config.pairs_without, config.n_pairs))
    encoded = encode_pairs(
        loaded.model, loaded.tokenizer, pairs.pairs, prompter.template_kwargs, config.max_prompt_length
    )
    batches = batch_shapes(loaded.model, encoded, shape.n_adapted)
    # The worst is the batch of most tokens, of most logits, or of most tokens in a side.
    worst = {max(batches, key=of) for of in (lambda b: b[1] * b[2], lambda b: b[1] * b[3], lambda b: b[4])}
    extraction = [shape.extraction(*batch) for batch in worst]
    resting = shape.resting(len(encoded))
    phases = {
        "decomposition": shape.decomposition(),
        "extraction": resting | max(extraction, key=lambda parts: sum(parts.values())),
        "generation": resting | shape.generation(prompt, config.max_completion_length),
        "update": resting | shape.update(prompt, config.max_completion_length),
    }
    host = {}
    if shape.on_gpu:
        host = {"factors": shape.factors, "pair gradients": len(encoded) * shape.n_delta * _FLOAT}
        if config.offload:
            host["weights while generating"] = shape.adapted  # W, and W' is in its place
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
    return Forecast(about, phases, host)


def _device_wished(name: str | None) -> str:
    """A GPU may be asked about where there is none."""
    return name if name is not None and name.startswith("cuda") else device_of(name)


class _Shape:
    """Sizes of a model without numbers, in bytes where nothing else is said."""

    def __init__(self, model: Any, config: TrainConfig, on_gpu: bool) -> None:
        self.model, self.config, self.on_gpu = model.requires_grad_(False), config, on_gpu
        self.item = model.dtype.itemsize
        head = model.get_output_embeddings()
        self.linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
        self.sizes = sizes = [(max(linear.weight.shape), min(linear.weight.shape)) for linear in self.linears]
        self.vocabulary, self.hidden = head.weight.shape
        self.n_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.n_adapted = sum(large * small for large, small in sizes)
        self.n_delta = sum(small for _, small in sizes)
        self.weights, self.adapted = self.n_parameters * self.item, self.n_adapted * self.item
        self.factors = sum((large + small) * small for large, small in sizes) * _FLOAT
        self.largest, self.rank = max(sizes)
        self.n_largest = max(large * small for large, small in sizes)

    def resting(self, n_pairs: int) -> dict[str, int]:
        """What is there from the first step to the last."""
        of_delta = 7  # δ, its gradient, that of both sources, two moments, the value that W' was made of
        # V, the pairs' coefficients and the spectrum are smaller than the gradients that they came from.
        kept = (of_delta + 2 * min(self.config.v_hack_k, n_pairs)) * self.n_delta * _FLOAT
        return {"weights": self.weights, "factors": self.factors, "merged": self.adapted, "delta, optimiser, V": kept}

    def decomposition(self) -> dict[str, int]:
        """In float64, as many weights at a time as there are threads; on a GPU one."""
        threads = 1 if self.on_gpu else torch.get_num_threads()
        one = 2 * self.largest * self.rank + 6 * self.rank**2  # W and its long factor; the square ones and LAPACK's own
        factors = 0 if self.on_gpu else self.factors
        return {"weights": self.weights, "factors": factors, "at work": threads * one * 8}

    def extraction(self, packed: bool, rows: int, width: int, kept: int, scored: int) -> dict[str, int]:
        """A batch of pairs: `kept` places of each row have logits, `scored` tokens are of a side."""
        saved = saved_bytes(self.model, self.linears, rows, width, own_mask=packed)
        wide = max(self.item, _FLOAT)
        logits = rows * kept * self.vocabulary * self.item + 3 * scored * self.vocabulary * wide
        work = self._backward(rows * width, groups=rows, by_row=True)
        return {"activations": saved.together, "logits": logits, "at work": work}

    def generation(self, prompt: int, completion: int) -> dict[str, int]:
        """All rows that are sampled at once."""
        config, text = self.config, self.model.config.get_text_config()
        per_prompt = config.group_size - config.num_teacher
        rows = config.prompts_per_step * config.steps_per_generation * per_prompt
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        one = rows * (prompt + completion) * heads * width * self.item
        cache = 2 * text.num_hidden_layers * one
        prefill = 3 * rows * prompt * max(self.largest, self.hidden) * self.item
        # Logits and their copies in float32, sorted with their places (8 bytes each) for the nucleus.
        sampling = rows * self.vocabulary * (5 * _FLOAT + 8)
        return {"keys and values": cache, "logits": sampling, "at work": max(prefill, 2 * one)}

    def update(self, prompt: int, completion: int) -> dict[str, int]:
        """One micro-batch, forward and backward."""
        config = self.config
        rows, width = config.micro_batch, prompt + completion
        saved = saved_bytes(self.model, self.linears, rows, width)
        scored = rows * completion if self.on_gpu else rows * (width - 1)
        tile = min(scored, TOKEN_CHUNK_SIZE) * min(self.vocabulary, VOCAB_CHUNK_SIZE)
        # TRL's kernel works in place; without it eight tiles of float32 are there at the worst moment of the backward.
        tiles = tile * self.item if self.on_gpu else tile * (8 * _FLOAT)
        logits = tiles + scored * self.hidden * (2 * _FLOAT)
        by_row = bool(config.rollout_grad_every)
        deferred = {}
        several = config.prompts_per_step * config.group_size > config.micro_batch
        if several and config.defer_budget_gb:
            # Both sources' rows; modules that have few tokens for their width take no weight's gradient.
            wanted = sum(2 * a * b * _FLOAT for a, b in self.sizes if rows * width >= 2 * a)
            deferred = {"deferred gradients": min(wanted, int(config.defer_budget_gb * GB))}
        work = self._backward(rows * width, groups=rows if by_row else 2, by_row=by_row)
        if not config.gradient_checkpointing:
            return deferred | {"activations": saved.together, "logits": logits, "at work": work}
        # A layer's activations are made again once the logits are gone.
        moments = (
            {"activations": saved.inputs, "logits": logits},
            {"activations": saved.inputs + saved.layer, "at work": work},
        )
        return deferred | max(moments, key=lambda parts: sum(parts.values()))

    def _backward(self, tokens: int, groups: int, by_row: bool) -> int:
        """The gradients in flight at the widest layer, and what dL/dδ is made from there."""
        flying = 3 * tokens * self.largest * self.item
        if by_row or tokens < groups * self.largest:
            return flying + 3 * tokens * self.rank * _FLOAT
        return flying + self.n_largest * (self.item + 2 * _FLOAT)


@dataclass(frozen=True)
class Saved:
    """Bytes that a forward keeps for its backward."""

    together: int
    """Of everything, without checkpointing."""
    inputs: int
    """Of the layers' inputs, and of what is outside of them: what checkpointing keeps."""
    layer: int
    """Of the largest layer alone."""


def saved_bytes(model: Any, linears: list[nn.Linear], rows: int, width: int, own_mask: bool = False) -> Saved:
    """Of all distinct tensors that a forward of `rows` x `width` tokens keeps, parameters left out, where every one of
    `linears` is adapted.

    `model` has its weights on the meta device, none of which asks for a gradient. `own_mask`: the attention's mask is
    given in the model's precision and kept once, and not once a layer.
    """
    counter = _SavedTensors(model)
    ids = torch.zeros(rows, width, dtype=torch.long, device="meta")
    with (
        _counting_layers(model, linears, counter, rows, width, own_mask) as layers,
        torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda x: x),
        torch.enable_grad(),
    ):
        model.base_model(input_ids=ids, use_cache=False)
    inputs = len(layers) * rows * width * model.config.get_text_config().hidden_size * model.dtype.itemsize
    return Saved(counter.total, counter.total - sum(layers) + inputs, max(layers))


class _SavedTensors:
    """Bytes of the distinct storages that autograd is asked to keep."""

    def __init__(self, model: nn.Module) -> None:
        self.total = 0
        self._seen: dict[int, Tensor] = {x.untyped_storage()._cdata: x for x in model.parameters()}

    def pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = x  # held, so that its number is not given to another
            self.total += storage.nbytes()
        return x


@contextmanager
def _counting_layers(
    model: Any, linears: list[nn.Linear], counter: _SavedTensors, rows: int, width: int, own_mask: bool
) -> Iterator[list[int]]:
    """The model as the adapter and the attention's kernels would leave it to autograd; yields the bytes that each
    decoder layer keeps."""
    layers: list[int] = []
    mask = torch.empty(rows, 1, width, width, dtype=model.dtype, device="meta") if own_mask else None
    AttentionInterface.register("counted", partial(_counted_attention, mask))
    before = model.config._attn_implementation
    handles = []
    for layer in (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)):
        handles.append(layer.register_forward_pre_hook(lambda *_: layers.append(-counter.total)))
        handles.append(layer.register_forward_hook(lambda *_: layers.append(layers.pop() + counter.total)))
    for linear in linears:
        vars(linear)["forward"] = partial(_counted_linear, linear)
    try:
        model.set_attn_implementation("counted")
        yield layers
    finally:
        model.set_attn_implementation(before)
        for linear in linears:
            del vars(linear)["forward"]
        for handle in handles:
            handle.remove()


class _Kept(torch.autograd.Function):
    """Keeps its inputs and its result, and gives the result's gradient to all."""

    @staticmethod
    def forward(ctx: Any, result: Callable[[], Tensor], keep_result: bool, *inputs: Tensor) -> Tensor:
        made = result()
        ctx.save_for_backward(*inputs, *([made] if keep_result else []))
        return made


def _counted_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """What `_MergedLinear` keeps: x, and the weight, which is counted elsewhere. δ always asks for a gradient."""
    wanted = x if x.requires_grad else x.detach().requires_grad_()
    return _Kept.apply(lambda: x.new_empty(*x.shape[:-1], linear.out_features), False, wanted)


def _counted_attention(
    mask: Tensor | None, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """What the fused kernels keep: query, keys and values for every head, the output, a number a row, and the mask,
    which they turn from truth values into numbers, each layer for itself."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # with a mask the kernels want a key for each query head
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if mask is None:
        mask = query.new_empty(query.shape[0], 1, query.shape[2], key.shape[2])
    sums = query.new_empty(query.shape[:3], dtype=torch.float32)
    # Laid out as the kernels do, (rows, tokens, heads, width), so that the next line copies nothing.
    out = _Kept.apply(
        lambda: query.new_empty(query.transpose(1, 2).shape).transpose(1, 2), True, query, key, value, mask, sums
    )
    return out.transpose(1, 2).contiguous(), None
