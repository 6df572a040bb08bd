"""METHOD 1, the adapter: what δ computes, its gradient, and that PEFT and Transformers treat it as one of their own."""

import copy
import json
import math
import pickle
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from projected_grpo import peft_registration
from projected_grpo import svd as svd_module
from projected_grpo.adapter import (
    DeltaSConfig,
    DeltaSLinear,
    DeltaSModel,
    delta_s_modules,
    delta_s_parameters,
)
from projected_grpo.row_grads import RowGradRecorder
from projected_grpo.svd import Factors, svd_factors

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",  # PEFT and Transformers between themselves
    "ignore:Adapter one was active which is now deleted",
    "ignore:Already following adapters were merged two",
)
few = settings(max_examples=25, deadline=None, derandomize=True)
IDS = torch.randint(0, 97, (3, 6), generator=torch.Generator().manual_seed(5))
HALF = (torch.bfloat16, torch.float16)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def build_model(seed=0, dtype=torch.float32, tied=False, family="qwen3", bias=True):
    """Two layers, with biases where the architecture has them; about 20k parameters."""
    torch.manual_seed(seed)
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=tied, attention_bias=bias))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, mlp_bias=bias))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    return model.to(dtype).eval()


def steer(model, seed=0, scale=0.1):
    """Give the active adapter a δ that does something."""
    generator = torch.Generator().manual_seed(seed)
    for delta in delta_s_parameters(model).values():
        delta.data.copy_(scale * torch.randn(delta.shape, generator=generator))
    return model


def adapted(seed=0, dtype=torch.float32, **kwargs):
    return steer(get_peft_model(build_model(dtype=dtype, **kwargs), DeltaSConfig()), seed)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def bits(x):
    """The bits of a tensor as integers, so that equality tells -0.0 from 0.0 and NaN equals itself."""
    return x.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).clone()


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def same_logits(a, b):
    return same_bits(logits(a), logits(b))


def base_weights(model):
    return {name: x.detach().clone() for name, x in model.state_dict().items() if "delta_s" not in name}


def same_weights(a, b):
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def deltas(model):
    return {name: x.detach().clone() for name, x in delta_s_parameters(model).items()}


def linear_names(model):
    """Every linear layer but the LM head, found without PEFT."""
    head = model.get_output_embeddings()
    return {name for name, module in model.named_modules() if type(module) is nn.Linear and module is not head}


def make_weight(kind, d_out, d_in, seed):
    full = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "zero":
        return torch.zeros_like(full)
    if kind == "rank_deficient":
        return full[:, :1] @ full[:1]
    if kind == "degenerate":
        u, _, vh = torch.linalg.svd(full, full_matrices=False)
        return 0.5 * u @ vh
    return full


def make_linear(kind, d_out, d_in, bias, seed, dtype=torch.float64):
    linear = nn.Linear(d_in, d_out, bias=bias).to(dtype)
    linear.weight.data.copy_(make_weight(kind, d_out, d_in, seed))
    return linear.requires_grad_(False)


layers = {
    "kind": st.sampled_from(["full", "zero", "rank_deficient", "degenerate"]),
    "d_out": st.integers(1, 7),
    "d_in": st.integers(1, 7),
    "bias": st.booleans(),
    "seed": st.integers(0, 99),
}


# --- y = x Wᵀ + b + ((x Vhᵀ) ∘ δ) Uᵀ and its gradient ----------------------------------------------------------------


@few
@given(**layers)
@example(kind="zero", d_out=1, d_in=1, bias=False, seed=0)
@example(kind="degenerate", d_out=6, d_in=6, bias=True, seed=0)
@example(kind="rank_deficient", d_out=7, d_in=2, bias=True, seed=1)
def test_output_and_gradient_equal_a_token_loop_and_a_merged_dense_layer(kind, d_out, d_in, bias, seed):
    linear = make_linear(kind, d_out, d_in, bias, seed)
    layer = DeltaSLinear(copy.deepcopy(linear), "default", DeltaSConfig())
    u, vh, r = layer.u, layer.vh, min(d_out, d_in)
    assert (u.shape, vh.shape, layer.delta_s["default"].shape) == ((d_out, r), (r, d_in), (r,))
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(r, generator=generator, dtype=torch.float64)
    layer.delta_s["default"].data.copy_(delta)
    x = torch.randn(2, 4, d_in, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 4, d_out, generator=generator, dtype=torch.float64)

    y = layer(x)
    y.retain_grad()
    (y.tanh() * weights).sum().backward()

    slow_y = torch.zeros_like(y)
    slow_grad = torch.zeros(r, dtype=torch.float64)
    for row in range(2):
        for token in range(4):
            x_t, dy_t = x.detach()[row, token], y.grad[row, token]
            slow_y[row, token] = linear.weight @ x_t + (linear.bias if bias else 0)
            for i in range(r):
                slow_y[row, token] += u[:, i] * delta[i] * (vh[i] @ x_t)
                slow_grad[i] += (u[:, i] @ dy_t) * (vh[i] @ x_t)
    torch.testing.assert_close(y.detach(), slow_y.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.delta_s["default"].grad, slow_grad, rtol=0, atol=1e-10)

    dense = copy.deepcopy(linear).requires_grad_(True)
    dense.weight.data += u @ torch.diag(delta) @ vh
    dense_x = x.detach().clone().requires_grad_(True)
    dense_y = dense(dense_x)
    (dense_y.tanh() * weights).sum().backward()
    torch.testing.assert_close(y.detach(), dense_y.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(x.grad, dense_x.grad, rtol=0, atol=1e-10)
    through_dense = torch.stack([u[:, i] @ dense.weight.grad @ vh[i] for i in range(r)])
    torch.testing.assert_close(layer.delta_s["default"].grad, through_dense, rtol=0, atol=1e-10)
    assert layer.base_layer.weight.grad is None


def test_gradient_of_every_module_of_a_model_equals_a_loop_over_tokens():
    model = adapted(dtype=torch.float64)
    seen = {}

    def keep(name):
        def hook(_module, inputs, output):
            output.retain_grad()
            seen[name] = (inputs[0].detach(), output)

        return hook

    for name, module in delta_s_modules(model).items():
        module.register_forward_hook(keep(name))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert seen.keys() == delta_s_parameters(model).keys()
    for name, module in delta_s_modules(model).items():
        x, y = seen[name]
        slow = torch.zeros_like(module.delta_s["default"])
        for x_t, dy_t in zip(x.flatten(0, 1), y.grad.flatten(0, 1), strict=True):
            slow += (module.u.T @ dy_t) * (module.vh @ x_t)
        assert slow.norm() > 0
        torch.testing.assert_close(module.delta_s["default"].grad, slow, rtol=0, atol=1e-10)


@few
@given(**layers)
def test_effective_weight_is_w_plus_u_diag_delta_vh(kind, d_out, d_in, bias, seed):
    linear = make_linear(kind, d_out, d_in, bias, seed, torch.float32)
    layer = DeltaSLinear(linear, "default", DeltaSConfig())
    factors = svd_factors(linear.weight)
    assert torch.equal(layer.u, factors.u)
    assert torch.equal(layer.vh, factors.vh)
    layer.delta_s["default"].data.copy_(-factors.s)  # δ = -S takes the weight away, whatever its rank
    x = torch.randn(5, d_in, generator=torch.Generator().manual_seed(seed))
    expected = linear.bias.expand(5, -1) if bias else torch.zeros(5, d_out)
    torch.testing.assert_close(layer(x).detach(), expected, rtol=0, atol=2e-5)


# --- identity: δ = 0, and disable_adapter ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_at_delta_zero_the_logits_are_the_base_models_bit_for_bit(family, dtype):
    base = build_model(dtype=dtype, family=family)
    expected = logits(base)
    model = get_peft_model(base, DeltaSConfig())
    assert all(delta.count_nonzero() == 0 for delta in deltas(model).values())
    assert same_bits(logits(model), expected)
    steer(model)
    assert not same_bits(logits(model), expected)


def test_zero_weight_and_one_row_layers_are_identities_at_delta_zero():
    for kind, d_out, d_in in [("zero", 4, 4), ("degenerate", 5, 5), ("rank_deficient", 3, 6), ("full", 1, 4)]:
        linear = make_linear(kind, d_out, d_in, True, 0, torch.float32)
        layer = DeltaSLinear(linear, "default", DeltaSConfig())
        x = torch.randn(2, 3, d_in)
        assert torch.equal(layer(x), linear(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_training_disable_adapter_gives_the_base_models_logits_bit_for_bit(dtype):
    base = build_model(dtype=dtype)
    expected, weights = logits(base), base_weights(base)
    model = get_peft_model(base, DeltaSConfig()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    assert losses[-1] < losses[0]
    trained = logits(model)
    assert not same_bits(trained, expected)
    with model.disable_adapter():
        assert same_bits(logits(model), expected)
    assert same_bits(logits(model), trained)
    assert same_weights(base_weights(model.unload()), weights)


def test_disable_adapter_also_undoes_a_merge():
    expected = logits(build_model())
    model = adapted()
    model.merge_adapter()
    with model.disable_adapter():
        assert same_bits(logits(model), expected)


# --- what is trained -------------------------------------------------------------------------------------------------


def test_delta_s_is_the_only_trained_parameter_and_its_count_is_the_sum_of_r(capsys):
    base = build_model()
    ranks = {name: min(base.get_submodule(name).weight.shape) for name in linear_names(base)}
    everything = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, DeltaSConfig())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(ranks) == 14
    assert all(name.endswith("delta_s.default") for name in trained)
    assert {name: p.numel() for name, p in delta_s_parameters(model).items()} == ranks
    total = sum(ranks.values())
    assert model.get_nb_trainable_parameters() == (total, everything + total)
    model.print_trainable_parameters()
    assert f"trainable params: {total:,} || all params: {everything + total:,}" in capsys.readouterr().out


def test_inference_mode_trains_nothing():
    model = get_peft_model(build_model(), DeltaSConfig(inference_mode=True))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == []
    assert same_logits(model, build_model())


def test_names_outside_the_tuners_prefix_are_the_base_models_own():
    # TRL pushes a merged policy to vLLM by skipping names with the tuner's prefix and cleaning up the others.
    model = adapted()
    assert model.base_model.prefix == "delta_s"
    names = [name for name in model.state_dict() if model.base_model.prefix not in name]
    cleaned = [name.removeprefix("base_model.model.").replace(".base_layer", "") for name in names]
    assert sorted(cleaned) == sorted(build_model().state_dict())
    assert not any(name.endswith((".u", ".vh")) for name in model.state_dict())  # factors are not persistent


# --- target modules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [{}, {"target_modules": "all-linear"}])
def test_all_linear_is_every_linear_layer_except_the_lm_head(tied, config):
    expected = linear_names(build_model(tied=tied))
    model = get_peft_model(build_model(tied=tied), DeltaSConfig(**config))
    assert delta_s_modules(model).keys() == expected
    assert list(delta_s_modules(model)) == [n for n, m in build_model().named_modules() if n in expected]
    assert type(model.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        ({"target_modules": ["q_proj", "down_proj"]}, r"\.(q_proj|down_proj)$"),
        ({"target_modules": ["layers.0.self_attn.q_proj"]}, r"layers\.0\.self_attn\.q_proj$"),
        ({"target_modules": r".*layers\.1\.mlp\.(up|gate)_proj"}, r"layers\.1\.mlp\.(up|gate)_proj$"),
        ({"exclude_modules": ["q_proj"]}, r"(?<!q_proj)$"),
        ({"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"}, r"layers\.1\."),
    ],
)
def test_target_modules_by_list_and_by_regular_expression_survive_saving(tmp_path, config, pattern):
    expected = {name for name in linear_names(build_model()) if re.search(pattern, name)}
    assert expected
    model = steer(get_peft_model(build_model(), DeltaSConfig(**config)))
    assert delta_s_modules(model).keys() == expected
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build_model(), tmp_path)
    assert delta_s_modules(again).keys() == expected
    assert same_logits(again, model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("target_modules", [["lm_head"], ["q_proj", "lm_head"], r".*(q_proj|lm_head)", ["head"]])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_naming_the_lm_head_is_refused_in_one_line(tied, target_modules):
    model = build_model(tied=tied)
    if target_modules == ["head"]:  # whatever it is called
        model.head = model.lm_head
        del model.lm_head
        model.get_output_embeddings = lambda: model.head
    with pytest.raises(ValueError, match="LM head") as refusal:
        get_peft_model(model, DeltaSConfig(target_modules=target_modules))
    assert "\n" not in str(refusal.value)


def test_modules_to_save_is_refused_in_one_line():
    with pytest.raises(ValueError, match="modules_to_save") as refusal:
        DeltaSConfig(modules_to_save=["lm_head"])
    assert "\n" not in str(refusal.value)
    assert "lm_head" in str(refusal.value)


class OddLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "layer", [nn.Embedding(5, 4), nn.Conv1d(4, 4, 1), nn.LayerNorm(4), OddLinear(4, 4)], ids=lambda m: type(m).__name__
)
def test_a_target_that_is_no_plain_linear_layer_is_refused_in_one_line(layer):
    with pytest.raises(ValueError, match=f"odd is a {type(layer).__name__}") as refusal:
        get_peft_model(nn.ModuleDict({"odd": layer, "fine": nn.Linear(4, 4)}), DeltaSConfig(target_modules=["odd"]))
    assert "\n" not in str(refusal.value)


def test_a_weight_that_has_no_svd_is_refused():
    model = build_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        get_peft_model(model, DeltaSConfig())


# --- merge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_merge_and_unmerge_are_exactly_reversible(dtype):
    model = adapted(dtype=dtype)
    before, weights, delta = logits(model), base_weights(model), deltas(model)
    for _ in range(3):
        model.merge_adapter()
        merged = base_weights(model)
        assert {module.merged for module in delta_s_modules(model).values()} == {True}
        for name, module in delta_s_modules(model).items():
            w = weights[f"base_model.model.{name}.base_layer.weight"].double()
            exact = w + module.u.double() @ torch.diag(delta[name].double()) @ module.vh.double()
            here = merged[f"base_model.model.{name}.base_layer.weight"]
            assert here.dtype == dtype
            # bfloat16 is rounded up or down, and not to the nearest: a whole step.
            rounding = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}[dtype]
            torch.testing.assert_close(here.double(), exact, rtol=rounding, atol=1e-6)
        model.unmerge_adapter()
        assert {module.merged for module in delta_s_modules(model).values()} == {False}
        assert same_weights(base_weights(model), weights)
        assert same_bits(logits(model), before)
    assert same_weights(deltas(model), delta)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_merged_and_unloaded_logits_equal_the_adapted_ones(dtype, tolerance):
    model = adapted(dtype=dtype)
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=tolerance)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert merged.state_dict().keys() == build_model().state_dict().keys()
    torch.testing.assert_close(logits(merged), before, rtol=0, atol=tolerance)
    assert (before - logits(build_model(dtype=dtype))).abs().max() > 100 * tolerance


def test_unload_gives_the_base_model_back():
    base = build_model()
    weights = base_weights(base)
    unloaded = adapted().unload()
    assert same_weights(base_weights(unloaded), weights)
    assert same_logits(unloaded, base)


def test_safe_merge_refuses_a_broken_delta_and_changes_nothing():
    model = adapted()
    next(iter(delta_s_parameters(model).values())).data[0] = math.nan
    weights = base_weights(model)
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.merge_adapter(safe_merge=True)
    assert same_weights(base_weights(model), weights)


def test_a_merge_survives_a_cast_of_the_model_and_is_still_undone():
    model = adapted()
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert same_weights(base_weights(model), base_weights(adapted(dtype=torch.bfloat16)))
    with model.disable_adapter():
        assert same_bits(logits(model), logits(build_model(dtype=torch.bfloat16)))


# --- save and load ---------------------------------------------------------------------------------------------------


def test_a_saved_adapter_holds_delta_s_and_fingerprints_and_nothing_else(tmp_path):
    model = adapted(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    expected = {f"base_model.model.{name}.{part}" for name in deltas(model) for part in ("delta_s", FINGERPRINT)}
    assert saved.keys() == expected
    for name, delta in deltas(model).items():
        assert same_bits(saved[f"base_model.model.{name}.delta_s"], delta)
        assert delta.dtype == torch.float32
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DELTA_S"


FINGERPRINT = "delta_s_fingerprint"


def by_from_pretrained(base, path):
    return PeftModel.from_pretrained(base, path)


def by_low_cpu_mem_usage(base, path):
    return PeftModel.from_pretrained(base, path, low_cpu_mem_usage=True)


def by_load_adapter(base, path):
    model = get_peft_model(base, DeltaSConfig())
    model.load_adapter(path, "second")
    model.set_adapter("second")
    return model


def by_transformers(base, path):
    base.load_adapter(str(path))
    return base


LOADERS = [by_from_pretrained, by_low_cpu_mem_usage, by_load_adapter, by_transformers]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_adapter_is_the_saved_one_bit_for_bit(tmp_path, load, dtype):
    model = adapted(dtype=dtype)
    model.save_pretrained(tmp_path)
    again = load(build_model(dtype=dtype), tmp_path)
    assert same_weights(deltas(again), deltas(model))  # float32 in a bfloat16 model too
    assert same_bits(logits(again), logits(model))
    for name, module in delta_s_modules(again).items():
        assert module.u.dtype == module.vh.dtype == torch.float32
        assert all(torch.equal(f, module.fingerprint) for f in module.delta_s_fingerprint.values()), name


def test_loading_trains_only_when_asked(tmp_path):
    adapted().save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(build_model(), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())
    trainable = PeftModel.from_pretrained(build_model(), tmp_path, is_trainable=True)
    assert {id(p) for p in trainable.parameters() if p.requires_grad} == {
        id(p) for p in delta_s_parameters(trainable).values()
    }


def test_auto_model_loads_an_adapter_folder_with_its_base_model(tmp_path):
    build_model().save_pretrained(tmp_path / "base")
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), model)


def test_a_whole_state_dict_goes_round(tmp_path):
    # As a checkpoint of the wrapped model does.
    model = adapted()
    other = get_peft_model(build_model(), DeltaSConfig())
    other.load_state_dict(model.state_dict())
    assert same_logits(other, model)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("merged", [False, True])
def test_a_copied_or_pickled_model_keeps_working_on_its_own(tmp_path, clone, merged):
    model = adapted()
    if merged:
        model.merge_adapter()
    before = logits(model)
    twin = clone(model)
    assert same_bits(logits(twin), before)
    twin.unmerge_adapter()
    steer(twin, seed=1)
    twin(input_ids=IDS, labels=IDS).loss.backward()
    assert same_bits(logits(model), before)
    assert all(p.grad is None for p in delta_s_parameters(model).values())
    assert not same_bits(logits(twin), before)
    twin.save_pretrained(tmp_path)
    assert same_logits(PeftModel.from_pretrained(build_model(), tmp_path), twin)


# --- over other weights, over other factors --------------------------------------------------------------------------


@pytest.mark.parametrize("load", LOADERS)
def test_an_adapter_is_refused_over_other_weights(tmp_path, load):
    adapted().save_pretrained(tmp_path)
    other = build_model()
    weight = other.model.layers[1].mlp.down_proj.weight  # one value of one module, by one place
    weight.data[0, 0] = torch.nextafter(weight.data[0, 0], torch.tensor(math.inf))
    with pytest.raises(ValueError, match="does not fit") as refusal:
        load(other, tmp_path)
    assert "weight differs" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def degenerate_model(dtype=torch.float32):
    model = build_model(dtype=dtype)
    weight = model.model.layers[0].self_attn.o_proj.weight
    weight.data.copy_(make_weight("degenerate", *weight.shape, seed=0))
    return model


def turned_factors(angle):
    """svd_factors, but the first two pairs of a degenerate weight turned: as correct a decomposition of W."""
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)

    def compute(weight, cache=None):
        factors = svd_factors(weight)
        if factors.s[0] - factors.s[-1] > 1e-5:
            return factors
        u, vh = factors.u.double(), factors.vh.double()
        u[:, :2], vh[:2] = u[:, :2] @ turn, turn.T @ vh[:2]
        torch.testing.assert_close((u * factors.s) @ vh, weight.double(), rtol=0, atol=1e-5)
        return Factors(u.float(), factors.s, vh.float(), factors.weight_hash)

    return compute


@pytest.mark.parametrize("load", LOADERS)
def test_an_adapter_is_refused_over_other_factors_of_the_same_weights(tmp_path, monkeypatch, load):
    model = steer(get_peft_model(degenerate_model(), DeltaSConfig()))
    model.save_pretrained(tmp_path)
    assert same_logits(load(degenerate_model(), tmp_path), model)
    monkeypatch.setattr(svd_module, "svd_factors", turned_factors(0.3))
    with pytest.raises(ValueError, match="does not fit") as refusal:
        load(degenerate_model(), tmp_path)
    assert "factors differ" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_turning_a_degenerate_pair_does_change_what_delta_means(monkeypatch):
    # Why the adapter above must be refused: the same δ over the other factors is another model.
    model = steer(get_peft_model(degenerate_model(), DeltaSConfig()))
    monkeypatch.setattr(svd_module, "svd_factors", turned_factors(0.3))
    other = steer(get_peft_model(degenerate_model(), DeltaSConfig()))
    assert (logits(other) - logits(model)).abs().max() > 1e-4


def test_an_adapter_is_accepted_over_factors_with_flipped_pairs(tmp_path, monkeypatch):
    # u_i vh_i is what δ_i scales; both signs flipped, it is the same.
    def flipped(weight, cache=None):
        factors = svd_factors(weight)
        signs = 1.0 - 2.0 * (torch.arange(len(factors.s)) % 2)
        return Factors(factors.u * signs, factors.s, factors.vh * signs[:, None], factors.weight_hash)

    model = adapted()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(svd_module, "svd_factors", flipped)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(build_model(), tmp_path)), logits(model), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("trained_in", HALF)
@pytest.mark.parametrize("load", LOADERS)
def test_a_half_precision_model_and_its_float32_upcast_share_adapters(tmp_path, trained_in, load):
    model = adapted(dtype=trained_in)
    model.save_pretrained(tmp_path / "half")
    upcast = load(build_model(dtype=trained_in).float(), tmp_path / "half")
    assert same_weights(deltas(upcast), deltas(model))
    if load is by_from_pretrained:
        upcast.save_pretrained(tmp_path / "float32")
        back = load(build_model(dtype=trained_in), tmp_path / "float32")
        assert same_bits(logits(back), logits(model))


def change_saved(path, change):
    file = path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_file_without_fingerprints_is_refused(tmp_path):
    # Nobody can say over which weights it was trained.
    adapted().save_pretrained(tmp_path)
    change_saved(tmp_path, lambda saved: {k: v for k, v in saved.items() if FINGERPRINT not in k})
    with pytest.raises(ValueError, match="fingerprint") as refusal:
        PeftModel.from_pretrained(build_model(seed=1), tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_fingerprint_of_another_shape_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    change_saved(tmp_path, lambda saved: {k: v[:32].clone() if FINGERPRINT in k else v for k, v in saved.items()})
    with pytest.raises((ValueError, RuntimeError), match="fingerprint"):
        PeftModel.from_pretrained(build_model(), tmp_path)


def test_delta_s_of_another_length_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    change_saved(tmp_path, lambda saved: {k: v if FINGERPRINT in k else v[:-1].clone() for k, v in saved.items()})
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(build_model(), tmp_path)


# --- two adapters on one model ---------------------------------------------------------------------------------------


def two_adapters(dtype=torch.float32):
    model = steer(get_peft_model(build_model(dtype=dtype), DeltaSConfig(), adapter_name="one"), seed=1)
    model.add_adapter("two", DeltaSConfig())
    model.set_adapter("two")
    return steer(model, seed=2)


def test_no_factors_are_kept_or_made_twice_for_a_second_adapter(monkeypatch):
    model = get_peft_model(build_model(), DeltaSConfig())
    assert model.base_model._factors == {}
    monkeypatch.setattr(svd_module, "decompose", None)
    monkeypatch.setattr(svd_module, "svd_factors", None)
    model.add_adapter("second", DeltaSConfig(target_modules=r".*(q_proj|down_proj).*"))
    assert model.base_model._factors == {}


def test_naming_the_lm_head_is_refused_before_anything_is_decomposed(monkeypatch):
    monkeypatch.setattr(svd_module, "svd_factors", None)
    with pytest.raises(ValueError, match="is the LM head"):
        get_peft_model(build_model(), DeltaSConfig(target_modules=["q_proj", "lm_head"]))


def test_two_adapters_share_factors_and_nothing_else():
    model = two_adapters()
    only_a, only_b = adapted(seed=1), adapted(seed=2)
    assert same_logits(model, only_b)
    model.set_adapter("one")
    assert same_logits(model, only_a)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 14
    assert all(name.endswith("delta_s.one") for name in trained)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for module in delta_s_modules(model).values():
        assert module.delta_s["one"].grad is not None
        assert module.delta_s["two"].grad is None
    with model.disable_adapter():
        assert same_logits(model, build_model())
    model.delete_adapter("one")
    assert set(model.peft_config) == {"two"}
    assert all(set(m.delta_s) == set(m.delta_s_fingerprint) == {"two"} for m in delta_s_modules(model).values())
    model.set_adapter("two")
    assert same_logits(model, only_b)


def test_two_adapters_are_saved_and_loaded_apart(tmp_path):
    model = two_adapters()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build_model(), tmp_path / "one", adapter_name="one")
    again.load_adapter(tmp_path / "two", "two")
    for name in ("one", "two"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert same_logits(again, model)
        assert all(k.endswith(("delta_s", FINGERPRINT)) for k in get_peft_model_state_dict(again, adapter_name=name))


@pytest.mark.parametrize("how", ["at once", "one after the other", "both active"])
def test_two_adapters_merged_are_the_sum_of_both_and_come_off_exactly(how):
    model = two_adapters(torch.float64)
    weights = base_weights(model)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    if how == "one after the other":
        model.merge_adapter(["two"])
        model.merge_adapter(["one"])
    else:
        model.merge_adapter(["one", "two"] if how == "at once" else None)
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-10)
    for name, module in delta_s_modules(model).items():
        total = module.delta_s["one"] + module.delta_s["two"]
        exact = weights[f"base_model.model.{name}.base_layer.weight"] + module.u @ torch.diag(total) @ module.vh
        torch.testing.assert_close(module.base_layer.weight, exact.detach(), rtol=0, atol=1e-12)
    model.unmerge_adapter()
    assert same_weights(base_weights(model), weights)
    torch.testing.assert_close(logits(model), both, rtol=0, atol=0)


def test_merging_one_of_two_adapters_merges_that_one():
    model = two_adapters(torch.float64)
    model.set_adapter("two")
    b = logits(model)
    model.set_adapter("one")
    a = logits(model)
    model.merge_adapter(["two"])
    torch.testing.assert_close(logits(model), b, rtol=0, atol=1e-10)
    model.unmerge_adapter()
    assert same_bits(logits(model), a)


def test_a_second_adapter_on_other_modules_is_silent_until_it_is_set(tmp_path):
    steer(get_peft_model(build_model(), DeltaSConfig(target_modules=["up_proj"])), seed=2).save_pretrained(tmp_path)
    model = steer(get_peft_model(build_model(), DeltaSConfig(target_modules=["q_proj"])), seed=1)
    before = logits(model)
    model.load_adapter(tmp_path, "other")
    assert same_bits(logits(model), before)
    assert delta_s_modules(model).keys() == {
        n for n in linear_names(build_model()) if n.endswith(("q_proj", "up_proj"))
    }
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(n.endswith("q_proj.delta_s.default") for n in trained)
    model.set_adapter("other")
    assert same_logits(model, PeftModel.from_pretrained(build_model(), tmp_path))


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_delta_s_and_factors_are_float32_over_a_half_precision_model(dtype, autocast_adapter_dtype):
    model = get_peft_model(build_model(dtype=dtype), DeltaSConfig(), autocast_adapter_dtype=autocast_adapter_dtype)
    for module in delta_s_modules(model).values():
        assert module.base_layer.weight.dtype == dtype
        assert module.u.dtype == module.vh.dtype == module.delta_s["default"].dtype == torch.float32
        assert torch.equal(module.u, svd_factors(module.base_layer.weight.float()).u)
    assert logits(model).dtype == dtype


CASTS = {
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to(cpu, float16)": lambda m: m.to("cpu", torch.float16),
    "half and back": lambda m: m.half().float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casting_the_model_leaves_delta_s_and_factors_as_they_are(tmp_path, cast):
    model = adapted()
    parameters, before = delta_s_parameters(model), deltas(model)
    factors = {name: (m.u.clone(), m.vh.clone()) for name, m in delta_s_modules(model).items()}
    dtype = cast(build_model()).dtype
    cast(model)
    assert all(p is parameters[name] for name, p in delta_s_parameters(model).items())  # an optimizer holds on to them
    assert same_weights(deltas(model), before)
    for name, module in delta_s_modules(model).items():
        assert module.base_layer.weight.dtype == dtype
        assert same_bits(module.u, factors[name][0])
        assert same_bits(module.vh, factors[name][1])
    assert logits(model).dtype == dtype
    with model.disable_adapter():
        assert same_bits(logits(model), logits(cast(build_model())))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert {p.grad.dtype for p in parameters.values()} == {torch.float32}
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {x.dtype for name, x in saved.items() if FINGERPRINT not in name} == {torch.float32}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casting_the_model_leaves_the_gradient_of_delta_s_as_it_is(cast):
    model = adapted()
    grads = gradients(model)
    cast(model)
    assert same_weights({name: p.grad for name, p in delta_s_parameters(model).items()}, grads)


@pytest.mark.parametrize("dtype", HALF)
def test_what_delta_s_adds_is_computed_in_float32_and_rounded_once(dtype):
    linear = make_linear("full", 6, 5, True, 0, dtype)
    layer = DeltaSLinear(linear, "default", DeltaSConfig(form="plain"))
    layer.delta_s["default"].data.copy_(torch.linspace(-1, 1, 5))
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    steered = ((x.float() @ layer.vh.T) * layer.delta_s["default"]) @ layer.u.T
    assert same_bits(layer(x), linear(x) + steered.to(dtype))


def test_autocast_changes_the_base_layers_precision_and_not_that_of_delta_s():
    linear = make_linear("full", 6, 5, True, 0, torch.float32)
    layer = DeltaSLinear(linear, "default", DeltaSConfig(form="plain"))
    layer.delta_s["default"].data.copy_(torch.linspace(-1, 1, 5))
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, base = layer(x), linear(x)
        assert y.dtype == base.dtype == torch.bfloat16
        steered = torch.nn.functional.linear(x, layer.vh)
        assert steered.dtype == torch.bfloat16  # what the layer would get if it did not leave autocast
    steered = ((x @ layer.vh.T) * layer.delta_s["default"]) @ layer.u.T
    assert same_bits(y, base + steered.to(torch.bfloat16))


def test_a_model_trains_under_autocast():
    model = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    rough = {name: p.grad.clone() for name, p in delta_s_parameters(model).items()}
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, p in delta_s_parameters(model).items():
        assert rough[name].dtype == torch.float32
        assert torch.cosine_similarity(rough[name], p.grad, dim=0) > 0.99
    with torch.autocast("cpu", torch.bfloat16), model.disable_adapter():
        reference = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(reference, logits(build_model()))
        assert same_bits(logits(get_peft_model(build_model(), DeltaSConfig())), reference)


# --- gradient checkpointing and per-row gradients --------------------------------------------------------------------


def gradients(model, ids=IDS):
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in delta_s_parameters(model).items()}


def enable_checkpointing(model, reentrant):
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradient(reentrant):
    plain = gradients(adapted(dtype=torch.float64))
    model = adapted(dtype=torch.float64)
    enable_checkpointing(model, reentrant)
    forwards = []
    next(iter(delta_s_modules(model).values())).register_forward_hook(lambda *_: forwards.append(1))
    checkpointed = gradients(model)
    assert len(forwards) == 2  # the layer did run twice
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=0, atol=1e-12)


class Rows:
    """What a recorder reports: per module, the row gradients in the order of the backward passes."""

    def __init__(self, model):
        self.names = {module: name for name, module in delta_s_modules(model).items()}
        self.grads = {name: [] for name in self.names.values()}

    def __call__(self, module, row_grads):
        assert not row_grads.requires_grad
        self.grads[self.names[module]].append(row_grads.clone())


def row_losses(model, ids):
    """One loss per row, whose sum is the batch's loss."""
    logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return -logps.gather(-1, ids[:, 1:, None]).squeeze(-1).sum(1)


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_row_gradients_sum_to_the_whole_gradient_over_accumulation(checkpointing):
    model = adapted(dtype=torch.float64).train()
    if checkpointing:
        enable_checkpointing(model, checkpointing == "reentrant")
    rows = Rows(model)
    batches = [IDS, IDS.flip(1)[:2]]
    with RowGradRecorder(rows).attached(model):
        for ids in batches:
            row_losses(model, ids).sum().backward()
    recorded = {name: p.grad.clone() for name, p in delta_s_parameters(model).items()}
    model.zero_grad()
    for ids in batches:
        row_losses(model, ids).sum().backward()
    for name, p in delta_s_parameters(model).items():
        assert [g.shape for g in rows.grads[name]] == [(3, p.numel()), (2, p.numel())]
        torch.testing.assert_close(recorded[name], p.grad, rtol=0, atol=1e-10)  # recording changes nothing
        torch.testing.assert_close(torch.cat(rows.grads[name]).sum(0), p.grad, rtol=0, atol=1e-10)


def test_a_rows_gradient_is_the_gradient_of_that_row_alone():
    model = adapted(dtype=torch.float64)
    rows = Rows(model)
    with RowGradRecorder(rows).attached(model):
        (row_losses(model, IDS) * torch.tensor([1.0, -2.0, 0.0])).sum().backward()
    for row, advantage in enumerate([1.0, -2.0, 0.0]):
        model.zero_grad()
        (advantage * row_losses(model, IDS[row : row + 1])).sum().backward()
        for name, p in delta_s_parameters(model).items():
            torch.testing.assert_close(rows.grads[name][0][row], p.grad, rtol=0, atol=1e-10)
    assert all(grads[0][2].count_nonzero() == 0 for grads in rows.grads.values())


@few
@given(**layers, n_rows=st.integers(1, 4), n_tokens=st.integers(1, 4))
def test_row_gradients_of_every_shape_of_layer(kind, d_out, d_in, bias, seed, n_rows, n_tokens):
    layer = DeltaSLinear(make_linear(kind, d_out, d_in, bias, seed), "default", DeltaSConfig())
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_rows, n_tokens, d_in, generator=generator, dtype=torch.float64)
    weights = torch.randn(n_rows, n_tokens, d_out, generator=generator, dtype=torch.float64)
    recorded = []
    with RowGradRecorder(lambda _module, grads: recorded.append(grads)).attached(layer):
        (layer(x) * weights).sum().backward()
    (grads,) = recorded
    for row in range(n_rows):
        slow = sum((layer.u.T @ weights[row, t]) * (layer.vh @ x[row, t]) for t in range(n_tokens))
        torch.testing.assert_close(grads[row], slow, rtol=0, atol=1e-10)
    torch.testing.assert_close(grads.sum(0), layer.delta_s["default"].grad, rtol=0, atol=1e-10)


def test_the_recorder_takes_itself_off_even_after_an_error():
    model = adapted()
    rows = Rows(model)

    def interrupted():
        with RowGradRecorder(rows).attached(model):
            assert all(module.recorder is not None for module in delta_s_modules(model).values())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(module.recorder is None for module in delta_s_modules(model).values())
    gradients(model)
    assert all(grads == [] for grads in rows.grads.values())


def test_the_recorder_sees_nothing_of_forwards_without_gradient_and_refuses_other_shapes():
    model = adapted()
    rows = Rows(model)
    with RowGradRecorder(rows).attached(model):
        before = logits(model)
        with model.disable_adapter():
            logits(model)
        assert same_bits(before, logits(adapted()))
        module = next(iter(delta_s_modules(model).values()))
        with pytest.raises(ValueError, match="rows, tokens, features"):
            module(torch.zeros(4, module.in_features))
    assert all(grads == [] for grads in rows.grads.values())


# --- finding the modules ---------------------------------------------------------------------------------------------


def test_delta_s_modules_have_the_base_models_names_however_the_model_is_wrapped(tmp_path):
    expected = linear_names(build_model())
    model = adapted()
    assert delta_s_modules(model).keys() == expected
    assert delta_s_modules(model.get_base_model()).keys() == expected
    wrapped = nn.Module()
    wrapped.module = model  # as DistributedDataParallel wraps it
    assert delta_s_modules(wrapped).keys() == expected
    injected = build_model()
    injected.add_adapter(DeltaSConfig())  # Transformers' own way
    assert delta_s_modules(injected).keys() == expected
    assert same_logits(injected, build_model())


def test_delta_s_parameters_refuses_no_adapter_and_two_active_ones():
    with pytest.raises(ValueError, match="no delta_s adapter"):
        delta_s_parameters(build_model())
    model = two_adapters()
    assert all(p is m.delta_s["two"] for p, m in zip(*both_views(model), strict=True))
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="2 active"):
        delta_s_parameters(model)


def both_views(model):
    return delta_s_parameters(model).values(), delta_s_modules(model).values()


# --- registration ----------------------------------------------------------------------------------------------------


def test_delta_s_is_a_member_of_pefts_enum_like_any_other_and_only_once():
    member = PeftType("DELTA_S")
    assert member is PeftType.DELTA_S is PeftType["DELTA_S"] is DeltaSConfig().peft_type
    assert (member.name, member.value, member) == ("DELTA_S", "DELTA_S", "DELTA_S")
    assert isinstance(member, PeftType)
    before = list(PeftType)
    assert before.count(member) == 1
    peft_registration.register("DELTA_S", DeltaSConfig, DeltaSModel)
    assert list(PeftType) == before
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert PeftType.LORA in PeftType
    with pytest.raises(ValueError, match="not a valid PeftType"):
        PeftType("DELTA_T")


def run_python(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_importing_the_package_imports_neither_torch_nor_peft():
    code = "import sys, projected_grpo; print({'torch', 'peft', 'transformers', 'trl'} & set(sys.modules))"
    assert run_python(code) == ["set()"]


ORDERS = [
    "import projected_grpo; import peft",
    "import peft; assert 'DELTA_S' not in list(peft.PeftType); import projected_grpo",
    "from projected_grpo import DeltaSConfig; import peft",
    "import projected_grpo.adapter; import projected_grpo; import peft",
]
# One interpreter that has paid for torch and Transformers; each order of imports runs in a fork of it.
LOAD = """
import os, sys, traceback
import accelerate, torch
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM
torch.set_num_threads(1)
assert not {"peft", "projected_grpo"} & set(sys.modules)
base, adapter, want, *orders = sys.argv[1:]

def load():
    import peft
    assert list(peft.PeftType).count("DELTA_S") == 1
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    expected = torch.load(want)
    assert torch.equal(model(input_ids=expected["ids"]).logits, expected["logits"])

for order in orders:
    if (child := os.fork()) == 0:
        try:
            exec(order)
            load()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), order, flush=True)
"""


@pytest.mark.slow
def test_a_process_that_imports_the_package_before_or_after_peft_loads_an_adapter(tmp_path):
    build_model().save_pretrained(tmp_path / "base")
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    torch.save({"ids": IDS, "logits": logits(model)}, tmp_path / "want.pt")
    paths = [tmp_path / name for name in ("base", "adapter", "want.pt")]
    assert run_python(LOAD, *paths, *ORDERS) == [f"0 {order}" for order in ORDERS]
