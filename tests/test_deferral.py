"""δ's gradient once a step against δ's gradient at every backward: the same sums, within a budget, and nothing kept."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_merged_forward import TOLERANCE, few, layer

from projected_grpo.deferral import DeferredGrads
from projected_grpo.row_grads import RowGradRecorder


def accumulated(made, batches, groups, budget_gb):
    """(δ's gradient, what the recorder saw in all, gradients that were held before the end)."""
    seen = []
    recorder = RowGradRecorder(lambda _module, part: seen.append(part.clone()))
    deferred = DeferredGrads(made, budget_gb)
    with recorder.attached(made) if groups else deferred.attached(), deferred.attached():
        for i, (x, weights) in enumerate(batches):
            recorder.groups = groups[i] if groups else None
            (made(x.clone().requires_grad_()) * weights).sum().backward()
    held = sum(grad.nbytes for grad in deferred._held.values())
    deferred.flush(recorder.on_grad if groups else None)
    assert not deferred._held
    return made.delta_s["default"].grad, sum(seen) if seen else None, held


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
    many = [rows * tokens >= max(n_groups, 1) * max(d_out, d_in) for rows, tokens in sizes]
    assert ours[2] or not any(many)
    for mine, its in zip(ours[:2], theirs[:2], strict=True):
        assert (mine is None) == (its is None)
        if mine is not None:
            scale = TOLERANCE[dtype] * max(1.0, its.abs().max().item())
            torch.testing.assert_close(mine, its, rtol=TOLERANCE[dtype], atol=scale)


def test_what_does_not_fit_the_budget_is_made_at_once():
    x = torch.randn(4, 30, 8, generator=torch.Generator().manual_seed(0))
    one = 2 * 8 * 8 * 4
    made = torch.nn.ModuleList([layer(8, 8, False, seed, torch.float32, "merged") for seed in range(3)])
    deferred = DeferredGrads(made, 2.5 * one / 1e9)
    recorder = RowGradRecorder(lambda *_: None)
    recorder.groups = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    with recorder.attached(made), deferred.attached():
        for _ in range(2):
            for module in made:
                module(x).square().sum().backward()
    assert [module.delta_s["default"].grad is None for module in made] == [True, True, False]
    deferred.flush()
    for module in made:
        again = layer(8, 8, False, list(made).index(module), torch.float32, "plain")
        (2 * again(x).square().sum()).backward()
        torch.testing.assert_close(module.delta_s["default"].grad, again.delta_s["default"].grad, rtol=1e-4, atol=1e-3)
    assert all(module.deferred is None for module in made)
    with recorder.attached(made), deferred.attached():  # the room is there again
        made[2](x).square().sum().backward()
    assert len(deferred._held) == 1


def test_a_step_whose_groups_change_in_number_is_refused():
    made = layer(4, 4, False, 0, torch.float64, "merged")
    x = torch.randn(4, 9, 4, dtype=torch.float64)
    deferred, recorder = DeferredGrads(made, 1.0), RowGradRecorder(lambda *_: None)
    with recorder.attached(made), deferred.attached():
        for n in (2, 3):
            recorder.groups = list(torch.arange(4).tensor_split(n))
            if n == 2:
                made(x).sum().backward()
            else:
                with pytest.raises(ValueError, match="3 groups of rows after 2 in the same step"):
                    made(x).sum().backward()


def test_every_active_adapter_gets_the_gradient_and_a_frozen_one_none():
    made = layer(5, 4, False, 0, torch.float64, "merged")
    for name in ("other", "still"):
        made.update_layer(name, type("Config", (), {"form": "merged", "inference_mode": False})())
    made._active_adapter = ["default", "other", "still"]
    made.delta_s["still"].requires_grad_(False)
    made.delta_s["default"].requires_grad_(True)
    made.delta_s["other"].requires_grad_(True)
    deferred = DeferredGrads(made, 1.0)
    with deferred.attached():
        made(torch.randn(40, 4, dtype=torch.float64)).square().sum().backward()
    deferred.flush()
    assert torch.equal(made.delta_s["default"].grad, made.delta_s["other"].grad)
    assert made.delta_s["default"].grad.norm() > 0
    assert made.delta_s["still"].grad is None
