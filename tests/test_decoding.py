"""Generation over a static cache: the same numbers as over a growing one."""

from contextlib import nullcontext, suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import CompileConfig, GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from projected_grpo import decoding
from projected_grpo.adapter import DeltaSConfig, delta_s_parameters
from projected_grpo.bench.generation import generate
from projected_grpo.decoding import (
    GROUPED,
    check_compiler,
    grouped_attention,
    grouped_attention_in,
    use_static_cache,
)
from projected_grpo.errors import InputError
from projected_grpo.models import load_model
from projected_grpo.presets import preset_defaults


class _Attention(torch.nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


def _by_hand(query, key, value, mask, scale):
    """softmax(q kᵀ scale) v for each query head with the keys of its group, one after the other."""
    groups = query.shape[1] // key.shape[1]
    heads = []
    for h in range(query.shape[1]):
        scores = query[:, h] @ key[:, h // groups].transpose(1, 2) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, 0], float("-inf"))
        heads.append(scores.softmax(-1) @ value[:, h // groups])
    return torch.stack(heads, 2)


@given(
    rows=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    tokens=st.integers(1, 2),
    length=st.integers(3, 6),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_grouped_attention_is_attention(rows, kv_heads, groups, tokens, length, masked, seed):
    draw = torch.Generator().manual_seed(seed)

    def normal(heads, n):
        return torch.randn(rows, heads, n, 4, generator=draw, dtype=torch.float64)

    query, key, value = normal(kv_heads * groups, tokens), normal(kv_heads, length), normal(kv_heads, length)
    mask = None
    if masked:
        mask = torch.rand(rows, 1, tokens, length, generator=draw) < 0.6
        mask[..., 0] = True
    out, weights = grouped_attention(_Attention(groups), query, key, value, mask, scaling=0.3, is_causal=False)
    theirs, _ = sdpa_attention_forward(_Attention(groups), query, key, value, mask, scaling=0.3, is_causal=False)
    assert weights is None
    assert out.shape == (rows, tokens, kv_heads * groups, 4)
    torch.testing.assert_close(out, _by_hand(query, key, value, mask, 0.3))
    torch.testing.assert_close(out, theirs)


def _model(seed=0, dtype="float64", device="cpu"):
    model = get_peft_model(load_model("tiny-random", dtype, device).model, DeltaSConfig()).eval()
    _move(model, seed)
    return model


def _move(model, seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in delta_s_parameters(model).values():
            delta.copy_(0.05 * torch.randn(delta.shape, generator=draw))


def _batch(length=12):
    ids = torch.randint(5, 250, (3, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}


def _both(model, batch):
    config = replace(preset_defaults("smoke"), max_completion_length=7)
    model.merge_adapter()
    growing, static = (generate(model, batch, config, static, **GREEDY, **LOGITS) for static in (False, True))
    model.unmerge_adapter()
    return growing, static


def test_the_static_cache_generates_what_the_growing_one_does(monkeypatch):
    seen = []

    def watched(module, query, *args, **kwargs):
        seen.append(query.shape[2])
        return grouped_attention(module, query, *args, **kwargs)

    monkeypatch.setitem(decoding.AttentionInterface._global_mapping, GROUPED, watched)
    model = _model()
    growing, static = _both(model, _batch())
    assert torch.equal(growing.sequences, static.sequences)
    torch.testing.assert_close(torch.stack(growing.logits), torch.stack(static.logits))
    assert seen == [12, 12] + [1, 1] * 6  # two layers: the prompt, then all but the last token
    assert type(static.past_key_values).__name__ == "StaticCache"
    assert static.past_key_values.layers[0].keys.shape[2] == 24  # 12 + 7, a multiple of eight
    assert model.config._attn_implementation == "sdpa"


def test_another_attention_than_sdpa_is_left_alone():
    model = _model()
    model.set_attn_implementation("eager")
    with grouped_attention_in(model):
        assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    with suppress(RuntimeError), grouped_attention_in(model):
        assert model.config._attn_implementation == GROUPED
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("device", "refused"), [("cuda:0", True), ("cpu", False)])
def test_what_compiling_needs_is_asked_for_by_name(monkeypatch, device, refused):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    says = r"--static-cache compiles and does not find a C compiler \(gcc, or CC\)"
    with pytest.raises(InputError, match=says) if refused else nullcontext():
        check_compiler(device)


@pytest.mark.slow
def test_the_compiled_step_follows_the_weights_and_is_not_compiled_anew(monkeypatch):
    """As on a GPU; a CPU is made to compile too. The cache has room for the longest prompt from the beginning."""

    def everywhere(config: GenerationConfig, tokens: int) -> None:
        assert tokens <= 21
        use_static_cache(config, 21)
        config.compile_config = CompileConfig(mode="default")
        config.compile_config._compile_all_devices = True

    monkeypatch.setattr("projected_grpo.bench.generation.use_static_cache", everywhere)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = _model()
    for seed, length in ((1, 10), (2, 12), (3, 9), (4, 14)):
        _move(model, seed)
        growing, static = _both(model, _batch(length))
        assert torch.equal(growing.sequences, static.sequences)
        torch.testing.assert_close(torch.stack(growing.logits), torch.stack(static.logits))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
