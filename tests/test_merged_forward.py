"""The merged forward against the plain one, for which test_adapter.py has a loop over tokens: outputs, gradients by any
groups of rows, and that the kept weight is never that of another δ."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from projected_grpo.adapter import DeltaSConfig, DeltaSLinear, delta_s_modules, delta_s_parameters
from projected_grpo.merged_forward import EffectiveWeight, rounded, unchanging
from projected_grpo.row_grads import RowGradRecorder

few = settings(max_examples=60, deadline=None, derandomize=True)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def layer(d_out, d_in, bias, seed, dtype, form, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(d_in, d_out, bias=bias).to(dtype)
    linear.weight.data.copy_(torch.randn(d_out, d_in, generator=generator))
    if bias:
        linear.bias.data.copy_(torch.randn(d_out, generator=generator))
    made = DeltaSLinear(linear.requires_grad_(False), "default", DeltaSConfig(form=form))
    delta = made.delta_s["default"]
    delta.data.copy_(scale * torch.randn(delta.shape, generator=generator))
    return made


def run(made, batches, groups):
    """(outputs, input gradients, δ's gradient, what the recorder saw) of accumulated batches of (x, weights of y)."""
    seen, outputs, grads = [], [], []
    recorder = RowGradRecorder(lambda _module, part: seen.append(part.clone()))
    with recorder.attached(made):
        for (x, weights), own in zip(batches, groups, strict=True):
            recorder.groups = own
            x = x.clone().requires_grad_()
            y = made(x)
            (y * weights).sum().backward()
            outputs.append(y.detach())
            grads.append(x.grad)
    return outputs, grads, made.delta_s["default"].grad, seen


@few
@given(
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    bias=st.booleans(),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=3),
    kind=st.sampled_from(["rows", "one", "two", "three"]),
)
def test_it_equals_the_plain_forward_in_everything(d_out, d_in, bias, seed, dtype, sizes, kind):
    generator = torch.Generator().manual_seed(seed)
    batches, groups = [], []
    for n_rows, n_tokens in sizes:
        shapes = (n_rows, n_tokens, d_in), (n_rows, n_tokens, d_out)
        batches.append(tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes))
        number = {"one": 1, "two": 2, "three": 3}.get(kind)
        chosen = torch.randint(number or 1, (n_rows,), generator=generator)
        groups.append(None if number is None else [(chosen == i).nonzero().flatten() for i in range(number)])
    plain, merged = (run(layer(d_out, d_in, bias, seed, dtype, form), batches, groups) for form in ("plain", "merged"))
    tolerance = TOLERANCE[dtype]
    for ours, theirs in zip(merged[0] + merged[1] + merged[3], plain[0] + plain[1] + plain[3], strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * max(1.0, theirs.abs().max().item()))
    total = plain[2]
    torch.testing.assert_close(merged[2], total, rtol=tolerance, atol=tolerance * max(1.0, total.abs().max().item()))


@few
@given(d_out=st.integers(1, 9), d_in=st.integers(1, 9), n=st.integers(1, 20), seed=st.integers(0, 99))
def test_without_a_recorder_and_with_inputs_of_any_shape(d_out, d_in, n, seed):
    x = torch.randn(n, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    grads = []
    for form in ("plain", "merged"):
        made = layer(d_out, d_in, True, seed, torch.float64, form)
        made(x).square().sum().backward()
        made(x[0]).sum().backward()
        grads.append(made.delta_s["default"].grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-8)


# --- bfloat16 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_change_far_below_the_steps_of_bfloat16_arrives_whole(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(256, 192, generator=generator).bfloat16()
    factors = torch.randn(256, 192, generator=generator), torch.randn(192, generator=generator)
    u, _, vh = torch.linalg.svd(factors[0], full_matrices=False)
    for scale in (1e-3, 1e-2, 1e-1):
        change = (u * (scale * factors[1])) @ vh
        moved = rounded(weight + change, torch.bfloat16).float() - weight.float()
        nearest = (weight + change).bfloat16().float() - weight.float()
        carried, lost = ((m * change).sum() / change.square().sum() for m in (moved, nearest))
        assert carried == pytest.approx(1, abs=0.15)
        assert lost < 0.6 or scale == 1e-1


def test_rounding_leaves_what_fits_alone_and_never_goes_further_than_one_step():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf"), float("nan"), 2.0**-130])
    kept = rounded(values[None], torch.bfloat16)[0]
    assert torch.equal(kept.nan_to_num(7.0), values.bfloat16().nan_to_num(7.0))
    assert torch.equal(kept[:6].signbit(), values[:6].signbit())
    wide = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    step = 2.0 ** (wide.abs().log2().floor() - 7)
    assert ((rounded(wide, torch.bfloat16).float() - wide).abs() < step).all()
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert torch.equal(rounded(wide, dtype), wide.to(dtype))


@pytest.mark.parametrize("n_tokens", [3, 40])
def test_in_bfloat16_it_is_as_close_to_float64_as_the_plain_forward_is(n_tokens):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, n_tokens, 32, generator=generator).bfloat16()
    weights = torch.randn(4, n_tokens, 24, generator=generator).bfloat16()
    groups = [[torch.tensor([0, 2]), torch.tensor([1, 3])]]
    exact = run(layer(24, 32, True, 1, torch.bfloat16, "plain").double(), [(x.double(), weights.double())], groups)
    errors = {}
    for form in ("plain", "merged"):
        found = run(layer(24, 32, True, 1, torch.bfloat16, form), [(x, weights)], groups)
        assert found[0][0].dtype == torch.bfloat16
        assert found[2].dtype == torch.float32
        pairs = zip((found[0][0], found[1][0], found[2]), (exact[0][0], exact[1][0], exact[2]), strict=True)
        errors[form] = [((ours.double() - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs]
    assert max(errors["merged"]) < 0.01
    assert all(m < 4 * p + 1e-3 for m, p in zip(errors["merged"][:2], errors["plain"][:2], strict=True))


# --- the kept weight -------------------------------------------------------------------------------------------------


def small_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)).double()
    model.config = {}
    return model


def adapted(form="merged"):
    model = get_peft_model(small_model(), DeltaSConfig(target_modules=["0", "2"], form=form))
    for i, delta in enumerate(delta_s_parameters(model).values()):
        delta.data.copy_(torch.linspace(-1, 1, len(delta)) * (i + 1))
    return model


X = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 6)


def step(model, **kwargs):
    optimiser = torch.optim.AdamW(delta_s_parameters(model).values(), lr=0.1, **kwargs)
    model(X).square().sum().backward()
    optimiser.step()
    model.zero_grad()


def each(model, change):
    for delta in delta_s_parameters(model).values():
        change(delta)


@torch.no_grad()
def in_place(model):
    each(model, lambda delta: delta.add_(0.5))


def replace_data(model):
    each(model, lambda delta: setattr(delta, "data", delta.data + 0.5))


def load(model):
    state = model.state_dict()
    model.load_state_dict({name: 0.5 * x if ".delta_s." in name else x for name, x in state.items()})


def load_peft(model):
    state = get_peft_model_state_dict(model)
    saved = {name: value if value.dtype == torch.uint8 else 0.5 * value for name, value in state.items()}
    set_peft_model_state_dict(model, saved)


def swap_parameters(model):
    for module in delta_s_modules(model).values():
        module.delta_s["default"] = nn.Parameter(module.delta_s["default"].data.flip(0))


def another(model):
    form = next(iter(delta_s_modules(model).values())).form
    model.add_adapter("other", DeltaSConfig(target_modules=["0", "2"], form=form))


def other_adapter(model):
    another(model)
    model.set_adapter("other")
    in_place(model)


def both_adapters(model):
    another(model)
    with torch.no_grad():
        for module in delta_s_modules(model).values():
            module.delta_s["other"].fill_(0.25)
    model.base_model.set_adapter(["default", "other"])


CHANGES = {
    "adamw": step,
    "adamw, one tensor at a time": lambda model: step(model, foreach=False),
    "adamw, fused": lambda model: step(model, fused=True),
    "in place": in_place,
    "through .data": lambda model: each(model, lambda delta: delta.data.mul_(0.5)),
    ".data replaced": replace_data,
    "load_state_dict": load,
    "peft's load": load_peft,
    "another parameter": swap_parameters,
    "an ablation of one axis": lambda model: each(model, lambda delta: delta.data[:1].zero_()),
    "all zero": lambda model: each(model, lambda delta: delta.data.zero_()),
    "another adapter": other_adapter,
    "two adapters": both_adapters,
    "merged and unmerged": lambda model: (model.merge_adapter(), in_place(model), model.unmerge_adapter()),
    "bfloat16 and back": lambda model: model.bfloat16().double(),
    "nothing": lambda model: None,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whoever_changes_delta_the_next_forward_knows(change):
    merged, plain = adapted(), adapted("plain")
    torch.testing.assert_close(merged(X), plain(X), rtol=1e-10, atol=1e-10)  # the copy is made
    for model in (merged, plain):
        change(model)
    torch.testing.assert_close(merged(X), plain(X), rtol=1e-9, atol=1e-9)
    with merged.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        assert torch.equal(merged(X), plain(X))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_block_in_which_nobody_changes_delta_begins_with_the_delta_of_its_beginning(change):
    merged, plain = adapted(), adapted("plain")
    merged(X)
    for model in (merged, plain):
        change(model)
    with unchanging(merged), unchanging(plain):
        for _ in range(2):
            torch.testing.assert_close(merged(X), plain(X), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        for module in [*delta_s_modules(merged).values(), *delta_s_modules(plain).values()]:
            module.delta_s["default"].add_(0.5)
    torch.testing.assert_close(merged(X), plain(X), rtol=1e-9, atol=1e-9)


def test_inside_such_a_block_no_module_compares_for_itself(monkeypatch):
    model, compared = adapted(), []
    model(X)
    fits = EffectiveWeight.fits
    monkeypatch.setattr(EffectiveWeight, "fits", lambda *args: compared.append(args) or fits(*args))
    with unchanging(model):
        with unchanging(model):
            model(X)
        model(X)
    assert not compared
    model(X)
    assert len(compared) == len(delta_s_modules(model))


def test_another_adapter_inside_such_a_block_is_another_weight():
    merged, plain = adapted(), adapted("plain")
    for model in (merged, plain):
        other_adapter(model)
    with unchanging(merged):
        for name in ("default", "other", "default"):
            merged.set_adapter(name)
            plain.set_adapter(name)
            torch.testing.assert_close(merged(X), plain(X), rtol=1e-9, atol=1e-9)
            with merged.disable_adapter():
                assert torch.equal(merged(X), small_model()(X))


@pytest.mark.parametrize("n", [16, 64, 256])
def test_memory_that_a_cast_gave_back_does_not_pass_for_the_old_weight(n):
    for seed in range(4):
        made = layer(n, n, False, seed, torch.float32, "merged")
        x = torch.randn(2, n, generator=torch.Generator().manual_seed(seed))
        made(x)
        made.bfloat16().float()
        fresh = made.base_layer.weight + made.get_delta_weight("default")
        torch.testing.assert_close(made(x), x @ fresh.T, rtol=1e-4, atol=1e-4)


def test_groups_count_from_the_forward_on_and_have_to_hold_every_row():
    made = layer(5, 4, False, 0, torch.float64, "merged")
    x = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = []
    recorder = RowGradRecorder(lambda _module, grads: seen.append(grads))
    with recorder.attached(made):
        recorder.groups = [torch.tensor([0]), torch.tensor([1, 2])]
        y = made(x)
        recorder.groups = [torch.tensor([0, 1, 2]), torch.tensor([], dtype=torch.long)]
        (y + 0 * made(x)).sum().backward()
        with pytest.raises(ValueError, match="groups of 3 rows were set, the input has 2"):
            made(x[:2])
    assert seen[1][1].norm() > 0 or seen[0][1].norm() > 0
    rows = RowGradRecorder(lambda _module, grads: seen.append(grads))
    with rows.attached(made):
        made(x).sum().backward()
    split = next(grads for grads in seen[:2] if grads[1].norm() > 0)
    torch.testing.assert_close(split, torch.stack([seen[2][0], seen[2][1:].sum(0)]))


def test_a_recorder_inside_another_gives_the_place_back():
    made = layer(5, 4, False, 0, torch.float64, "merged")
    outer, inner = RowGradRecorder(print), RowGradRecorder(print)
    with outer.attached(made):
        with inner.attached(made):
            assert made.recorder is inner
        assert made.recorder is outer
    assert made.recorder is None


def test_a_tiny_delta_over_a_float32_weight_under_autocast_moves_the_output_by_next_to_nothing():
    made = layer(48, 48, True, 0, torch.float32, "merged", scale=1e-12)
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        steered, base = made(x), made.base_layer(x)
    assert steered.dtype == torch.bfloat16
    assert (steered.float() - base.float()).norm() < 1e-3 * base.float().norm()


def test_under_ddp_the_gradients_are_the_same_and_no_factor_is_sent_around(tmp_path):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    alone, model, x = adapted(), adapted(), X[:, None]
    alone(x).square().sum().backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        parts = []
        recorder = RowGradRecorder(lambda _module, grads: parts.append(grads))
        recorder.groups = torch.arange(len(x)).tensor_split(2)
        for _ in range(2):  # gradients accumulate
            with recorder.attached(model):
                wrapped(x).square().sum().backward()
        sent = {id(x) for x in wrapped.modules_buffers}
        assert not any(id(x) in sent for m in delta_s_modules(model).values() for x in (m.u, m.vh))
    finally:
        dist.destroy_process_group()
    for name, delta in delta_s_parameters(alone).items():
        torch.testing.assert_close(delta_s_parameters(model)[name].grad, 2 * delta.grad)
    whole = sum(delta.grad.sum() for delta in delta_s_parameters(model).values())
    torch.testing.assert_close(sum(grads.sum() for grads in parts), whole)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_what_is_offloaded_is_gone_from_the_layer_and_comes_back_as_it_was(scale):
    model = adapted()
    each(model, lambda delta: delta.data.mul_(scale))
    modules = list(delta_s_modules(model).values())
    with pytest.raises(ValueError, match="only a merged adapter can be offloaded"):
        modules[0].offload()
    before = [(m.u.clone(), m.vh.clone(), m.base_layer.weight.clone()) for m in modules]
    wanted = model(X)
    for _ in range(2):
        model.merge_adapter()
        for module in modules:
            module.offload()
            assert (module.u.numel(), module.vh.numel()) == (0, 0)
        assert torch.equal(model(X), wanted)
        for module in modules:
            module.restore()
        model.unmerge_adapter()
        made = [module.effective.weight for module in modules if module.effective is not None]
        assert len(made) == (len(modules) if scale else 0)  # at δ = 0 it is W, whose memory has to go
        model(X)
        assert all(module.effective.weight is weight for module, weight in zip(modules, made, strict=False))
        for module, (u, vh, weight) in zip(modules, before, strict=True):
            assert torch.equal(module.u, u)
            assert torch.equal(module.vh, vh)
            assert torch.equal(module.base_layer.weight, weight)
        assert torch.equal(model(X), wanted)
        modules[0].restore()  # nothing is gone, so nothing comes
    model.merge_adapter()
    for module in modules:
        module.offload()
    with model.disable_adapter():  # unmerges
        assert torch.equal(model(X), small_model()(X))
    for module in modules:
        module.restore()
    assert torch.equal(model(X), wanted)


def test_merging_at_delta_zero_leaves_w_its_own_memory():
    model = adapted()
    each(model, lambda delta: delta.data.zero_())
    model.merge_adapter()
    for module in delta_s_modules(model).values():
        module.base_layer.weight.data.add_(1.0)
    model.unmerge_adapter()
    assert torch.equal(model(X), small_model()(X))


def test_a_second_adapter_of_another_form_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match="adapter 'other' has form='plain', the layer's first one 'merged'"):
        model.add_adapter("other", DeltaSConfig(target_modules=["0", "2"], form="plain"))


def test_the_copy_is_kept_while_nothing_changes_and_serves_the_merge():
    model = adapted()
    model(X)
    kept = [module.effective.weight for module in delta_s_modules(model).values()]
    model(X)
    model.merge_adapter()
    for module, weight in zip(delta_s_modules(model).values(), kept, strict=True):
        assert module.base_layer.weight.data_ptr() == weight.data_ptr()
    model.unmerge_adapter()
    model(X)
    assert all(m.effective.weight is w for m, w in zip(delta_s_modules(model).values(), kept, strict=True))


def test_a_copy_made_for_sampling_can_be_trained_on():
    model = adapted()
    with torch.inference_mode():
        model(X)
    model(X).sum().backward()
    assert all(delta.grad is not None for delta in delta_s_parameters(model).values())


def test_a_copied_model_has_a_weight_of_its_own():
    model = adapted()
    before = model(X)
    twin = copy.deepcopy(model)
    in_place(twin)
    assert torch.equal(model(X), before)
    assert not torch.allclose(twin(X), before)


def test_a_hook_on_the_base_layer_is_called():
    model, calls = adapted(), []
    expected = model(X)
    for module in delta_s_modules(model).values():
        module.base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(X), expected, rtol=1e-10, atol=1e-10)
    assert len(calls) == 2


def test_a_backward_hook_is_called_and_a_base_weight_that_is_trained_gets_its_gradient():
    model, calls = adapted(), []
    first, second = delta_s_modules(model).values()
    first.base_layer.register_full_backward_hook(lambda *_: calls.append(1))
    second.base_layer.weight.requires_grad_()
    model(X.clone().requires_grad_()).sum().backward()
    assert calls == [1]
    assert second.base_layer.weight.grad is not None


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form='fast' is unknown to DeltaSConfig; use one of merged, plain"):
        DeltaSConfig(form="fast")


@pytest.mark.slow
def test_a_compiled_model_gives_the_same():
    model = adapted()
    model(X).square().sum().backward()
    expected = model(X), [delta.grad.clone() for delta in delta_s_parameters(model).values()]
    model.zero_grad()
    compiled = torch.compile(model)
    compiled(X).square().sum().backward()
    torch.testing.assert_close(compiled(X), expected[0])
    for delta, grad in zip(delta_s_parameters(model).values(), expected[1], strict=True):
        torch.testing.assert_close(delta.grad, grad)
