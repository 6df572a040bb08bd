"""δ's gradient once a step against δ's gradient at every backward: the same sums, within a budget, and nothing kept."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_merged_forward import TOLERANCE, few, layer

from projected_grpo.adapter import DeltaSConfig, delta_s_parameters
from projected_grpo.deferral import DeferredGrads
from projected_grpo.row_grads import RowGradRecorder


def accumulated(made, batches, groups, budget_gb, dtype=None):
    """(δ's gradient, what the recorder saw in all, bytes that were held before the end)."""
    seen = []
    recorder = RowGradRecorder(lambda _module, part: seen.append(part.clone()))
    deferred = DeferredGrads(made, budget_gb, len(batches))
    with recorder.attached(made) if groups else deferred.attached(), deferred.attached():
        for i, (x, weights) in enumerate(batches):
            recorder.groups = groups[i] if groups else None
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = made(x.clone().requires_grad_())
            (y * weights).sum().backward()
    held = held_bytes(deferred)
    deferred.flush()
    assert not deferred._held
    assert deferred._room == deferred._budget
    return made.delta_s["default"].grad, sum(seen) if seen else None, held


def held_bytes(deferred):
    return sum(grad.nbytes for held in deferred._held.values() for grad in held.grads if grad is not None)


@few
@given(
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 12)), min_size=1, max_size=4),
    n_groups=st.integers(0, 3),
)
def test_it_equals_a_product_at_every_backward(d_out, d_in, seed, dtype, sizes, n_groups):
    generator = torch.Generator().manual_seed(seed)
    batches, groups = [], []
    for rows, tokens in sizes:
        shapes = (rows, tokens, d_in), (rows, tokens, d_out)
        batches.append(tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes))
        chosen = torch.randint(n_groups or 1, (rows,), generator=generator)
        groups.append([(chosen == i).nonzero().flatten() for i in range(n_groups)])
    own = groups if n_groups else None
    # δ itself has no part in its gradient's way to the sum, so the plain forward, which never defers, is the reference.
    theirs = accumulated(layer(d_out, d_in, False, seed, dtype, "plain"), batches, own, 1.0)
    ours = accumulated(layer(d_out, d_in, False, seed, dtype, "merged"), batches, own, 1.0)
    assert theirs[2] == 0
    many = [rows * tokens * len(sizes) >= max(n_groups, 1) * max(d_out, d_in) for rows, tokens in sizes]
    assert ours[2] or not any(many)
    for mine, its in zip(ours[:2], theirs[:2], strict=True):
        assert (mine is None) == (its is None)
        if mine is not None:
            scale = TOLERANCE[dtype] * max(1.0, its.abs().max().item())
            torch.testing.assert_close(mine, its, rtol=TOLERANCE[dtype], atol=scale)


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_the_sum_is_kept_in_float32(autocast):
    generator = torch.Generator().manual_seed(1)
    weight_dtype = torch.float32 if autocast else torch.bfloat16
    batches = [
        (torch.randn(4, 20, 32, generator=generator).to(weight_dtype), torch.randn(4, 20, 24, generator=generator))
        for _ in range(8)
    ]
    groups = [[torch.tensor([0, 2]), torch.tensor([1, 3])]] * 8
    wide = [(x.double(), weights.double()) for x, weights in batches]
    exact = accumulated(layer(24, 32, False, 1, weight_dtype, "plain").double(), wide, groups, 0.0)
    made = layer(24, 32, False, 1, weight_dtype, "merged")
    found = accumulated(made, batches, groups, 1.0, torch.bfloat16 if autocast else None)
    assert found[2] == 2 * 24 * 32 * 4
    for ours, theirs in zip(found[:2], exact[:2], strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - theirs).norm() < 0.01 * theirs.norm()


def test_what_does_not_fit_the_budget_is_made_at_once():
    x = torch.randn(4, 30, 8, generator=torch.Generator().manual_seed(0))
    one = 2 * 8 * 8 * 4
    made = torch.nn.ModuleList([layer(8, 8, False, seed, torch.float32, "merged") for seed in range(3)])
    deferred = DeferredGrads(made, 2.5 * one / 1e9, 2)
    recorder = RowGradRecorder(lambda *_: None)
    recorder.groups = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    with recorder.attached(made), deferred.attached():
        for _ in range(2):
            for module in made:
                module(x).square().sum().backward()
    assert [module.delta_s["default"].grad is None for module in made] == [True, True, False]
    deferred.flush()
    for seed, module in enumerate(made):
        again = layer(8, 8, False, seed, torch.float32, "plain")
        (2 * again(x).square().sum()).backward()
        theirs = again.delta_s["default"].grad
        torch.testing.assert_close(module.delta_s["default"].grad, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max())
    assert all(module.deferred is None for module in made)
    with recorder.attached(made), deferred.attached():  # the room is there again
        made[2](x).square().sum().backward()
    assert len(deferred._held) == 1


def test_a_group_without_rows_takes_no_memory_and_a_late_one_its_own():
    made = layer(8, 8, False, 0, torch.float64, "merged")
    seen, x = [], torch.randn(4, 30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    recorder = RowGradRecorder(lambda _module, grads: seen.append(grads))
    deferred = DeferredGrads(made, 1.0, 2)
    none, everyone = torch.tensor([], dtype=torch.long), torch.arange(4)
    with recorder.attached(made), deferred.attached():
        for groups, held in (([everyone, none], 1), ([everyone, none], 1), ([none, everyone], 2)):
            recorder.groups = groups
            made(x).square().sum().backward()
            assert held_bytes(deferred) == held * 8 * 8 * 8
    deferred.flush()
    (grads,) = seen
    torch.testing.assert_close(grads[0], 2 * grads[1], rtol=1e-10, atol=1e-10)


def test_few_tokens_in_all_are_not_waited_for():
    made = layer(16, 16, False, 0, torch.float64, "merged")
    for micro_batches, waits in ((1, False), (2, True)):
        deferred = DeferredGrads(made, 1.0, micro_batches)
        with deferred.attached():
            made(torch.randn(10, 16, dtype=torch.float64)).sum().backward()
        assert bool(deferred._held) == waits


def test_groups_that_change_in_number_are_refused_and_a_cleared_step_leaves_nothing_behind():
    made = layer(4, 4, False, 0, torch.float64, "merged")
    x = torch.randn(4, 9, 4, dtype=torch.float64)
    deferred, recorder = DeferredGrads(made, 1.0, 2), RowGradRecorder(lambda *_: None)

    def step(n):
        recorder.groups = list(torch.arange(4).tensor_split(n))
        with recorder.attached(made), deferred.attached():
            made(x).sum().backward()

    step(2)
    with pytest.raises(ValueError, match="3 groups of rows after 2 in one step"):
        step(3)
    deferred.clear()
    assert not deferred._held
    assert deferred._room == deferred._budget
    step(3)
    deferred.flush()
    assert made.delta_s["default"].grad.norm() > 0


def test_every_adapter_of_the_forward_gets_the_gradient_and_a_frozen_one_none():
    made = layer(5, 4, False, 0, torch.float64, "merged")
    for name in ("other", "still", "later"):
        made.update_layer(name, DeltaSConfig())
    made._active_adapter = ["default", "other", "still"]
    for name, delta in made.delta_s.items():
        delta.requires_grad_(name != "still")
    deferred = DeferredGrads(made, 1.0, 1)
    x = torch.randn(40, 4, dtype=torch.float64)
    with deferred.attached():
        made(x).square().sum().backward()
        made._active_adapter = ["later"]
        made(x[:30]).square().sum().backward()
    deferred.flush()
    grads = {name: delta.grad for name, delta in made.delta_s.items()}
    assert torch.equal(grads["default"], grads["other"])
    assert grads["still"] is None
    alone = layer(5, 4, False, 0, torch.float64, "plain")
    alone.delta_s["default"].data.zero_()
    alone(x[:30]).square().sum().backward()
    torch.testing.assert_close(grads["later"], alone.delta_s["default"].grad, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(grads["later"], grads["default"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_under_gradient_checkpointing_it_is_the_same():
    from peft import get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    torch.manual_seed(0)
    base, ids, grads = Qwen3ForCausalLM(config), torch.randint(0, 50, (4, 30)), []
    for budget, checkpointing in ((0.0, False), (1.0, False), (1.0, True)):
        model = get_peft_model(copy.deepcopy(base), DeltaSConfig()).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        deferred = DeferredGrads(model, budget, 2)
        for _ in range(2):
            with deferred.attached():
                model(input_ids=ids, labels=ids).loss.backward()
        assert bool(deferred._held) == bool(budget)
        deferred.flush()
        grads.append(torch.cat([delta.grad for delta in delta_s_parameters(model).values()]))
    for ours in grads[1:]:
        assert (ours - grads[0]).norm() <= 1e-5 * grads[0].norm()
