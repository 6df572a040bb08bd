"""What autograd keeps of a forward, in bytes, measured on a model without numbers (PyTorch's meta device).

The adapter and the attention's fused kernels are stood in for by functions that keep what those keep.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class Saved:
    """Bytes that a forward keeps for its backward."""

    together: int
    """Of everything, without checkpointing."""
    inputs: int
    """Of the layers' inputs, and of what is outside of them: what checkpointing keeps."""
    layer: int
    """Of the largest layer alone."""


Mask = Literal["none", "each", "once"]
"""Attention without a mask, with one of truth values (which each layer turns into numbers for itself), or with one that
is given in the model's precision and so kept once."""


def saved_bytes(model: Any, linears: list[nn.Linear], rows: int, width: int, mask: Mask) -> Saved:
    """Of all distinct tensors that a forward of `rows` x `width` tokens keeps, parameters left out, where every one of
    `linears` is adapted. `model` has its weights on the meta device, none of which asks for a gradient.
    """
    counter = _SavedTensors(model)
    ids = torch.zeros(rows, width, dtype=torch.long, device="meta")
    with (
        _counting_layers(model, linears, counter, rows, width, mask) as layers,
        torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda x: x),
        torch.enable_grad(),
    ):
        model.base_model(input_ids=ids, use_cache=False)
    inputs = len(layers) * rows * width * model.config.get_text_config().hidden_size * model.dtype.itemsize
    return Saved(counter.total, counter.total - sum(layers) + inputs, max(layers, default=0))


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
    model: Any, linears: list[nn.Linear], counter: _SavedTensors, rows: int, width: int, mask: Mask
) -> Iterator[list[int]]:
    """The model as the adapter and the attention's kernels would leave it to autograd; yields the bytes that each
    decoder layer keeps."""
    layers: list[int] = []
    one = torch.empty(rows, 1, width, width, dtype=model.dtype, device="meta")
    masks = {"none": lambda: None, "each": lambda: torch.empty_like(one), "once": lambda: one}
    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS["counted"] = partial(_counted_attention, masks[mask])
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
        del ALL_ATTENTION_FUNCTIONS["counted"]
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
    make_mask: Callable[[], Tensor | None],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, None]:
    """What the fused kernels keep: query, keys and values, the output, a number a row, and the mask."""
    kept = [query, key, value]
    if (mask := make_mask()) is not None:
        # With a mask the kernels want keys and values for each query head.
        groups = query.shape[1] // key.shape[1]
        kept = [query, *(x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value)), mask]
    sums = query.new_empty(query.shape[:3], dtype=torch.float32)
    # Laid out as the kernels do, (rows, tokens, heads, width), so that the next line copies nothing.
    out = _Kept.apply(lambda: query.new_empty(query.transpose(1, 2).shape).transpose(1, 2), True, *kept, sums)
    return out.transpose(1, 2).contiguous(), None
