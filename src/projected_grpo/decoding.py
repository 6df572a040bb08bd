"""Generation: over merged weights, and with `--static-cache` over keys and values of fixed size, compiled on a GPU.

A step of transformers' own loop starts some two thousand kernels on a model of 36 layers, and a GPU waits for most of
them (docs/performance.md). `torch.compile` fuses them; it wants tensors that keep their shape, which is what
transformers' static cache is for. Its attention then copies keys and values for every query head of a group. Ours takes
the queries of a group for so many positions of one head, as transformers does where it does not compile: no key is
copied.
"""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, CompileConfig, GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from projected_grpo.adapter import delta_s_modules
from projected_grpo.errors import InputError

GROUPED = "sdpa_grouped"


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' SDPA, but for a single token of a model with grouped queries under one mask for all heads.

    `query` (rows, heads, tokens, width), `key` and `value` (rows, heads / groups, length, width); returns (rows,
    tokens, heads, width).
    """
    groups = getattr(module, "num_key_value_groups", 1)
    one_mask = attention_mask is not None and attention_mask.shape[1] == 1
    special = any(kwargs.get(name) is not None for name in ("position_bias", "softcap"))
    if query.shape[2] > 1 or groups == 1 or not one_mask or special:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows, heads, _, width = query.shape
    out = F.scaled_dot_product_attention(
        query.view(rows, heads // groups, groups, width),
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=kwargs.get("dropout", 0.0),
        scale=kwargs.get("scaling"),
    )
    return out.reshape(rows, 1, heads, value.shape[-1]), None


def check_compiler(device: str) -> None:
    """Raises InputError where the step could not be compiled for `device`; a CPU's is not."""
    if not device.startswith("cuda"):
        return
    compiler = os.environ.get("CC") or "gcc"
    missing = [
        what
        for what, there in (
            ("a C compiler (gcc, or CC)", shutil.which(compiler) or shutil.which("cc")),
            ("triton", importlib.util.find_spec("triton")),
        )
        if not there
    ]
    if missing:
        raise InputError(
            f"--static-cache compiles and does not find {' or '.join(missing)}; install it or leave the flag out"
        )


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def use_static_cache(config: GenerationConfig, tokens: int) -> None:
    """Let `config` generate so, over a cache of `tokens` places: the longest prompt and completion of all, as a cache
    that grew with the prompts would be compiled for anew, and sum in another order after a resume. No CUDA graphs: they
    would be recorded anew for each step's merged weights."""
    config.cache_implementation = "static"
    config.max_cache_len = -(-tokens // 8) * 8
    config.disable_compile = False
    config.compile_config = CompileConfig(mode="default")


@contextmanager
def grouped_attention_in(model: Any) -> Iterator[None]:
    """`model`'s attention is ours inside the block, where it was SDPA."""
    before = model.config._attn_implementation
    if before != "sdpa":
        yield
        return
    model.set_attn_implementation(GROUPED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def merged(model, unless: bool, offload: bool) -> Iterator[None]:
    """Merged weights inside the block, so that `generate` sees plain Linears; nothing with `unless`. `offload`:
    what no merged weight needs is in a GPU's host memory."""
    if unless or not isinstance(model, PeftModel):
        yield
        return
    modules = delta_s_modules(model).values() if offload and model.device.type == "cuda" else ()
    model.merge_adapter()
    try:
        for module in modules:
            module.offload()
        yield
    finally:
        try:
            for module in modules:
                module.restore()
        finally:
            model.unmerge_adapter()
