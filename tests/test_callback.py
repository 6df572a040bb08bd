"""METHOD 4, 5 and 7 through `ProjectionCallback`, step by step in a plain torch loop: whatever trainer calls it, this
is the order of events. The stock TRL trainer is in test_readme_example.py."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from projected_grpo.adapter import DeltaSConfig, delta_s_modules, delta_s_parameters
from projected_grpo.basis import HackBasis
from projected_grpo.errors import InputError
from projected_grpo.projection import ProjectionCallback
from projected_grpo.projector import joint_norm

GATES = ("one_sided", "no_gate", "reverse")
TARGETS = ("grad", "update", "both", "displacement")
SHAPES = ((9, 7), (7, 11), (11, 6))


def build(shapes=SHAPES, seed=0, dtype=torch.float64):
    """A stack of linear layers, each with a `delta_s`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Sequential(*[nn.Linear(d_in, d_out, dtype=dtype) for d_in, d_out in shapes])
    return get_peft_model(layers, DeltaSConfig(target_modules=[str(i) for i in range(len(shapes))]))


def random_rows(model, k, seed=0, names=None):
    """A basis of k orthonormal rows in each of the modules `names`, default all."""
    generator = torch.Generator().manual_seed(seed)
    modules = {n: m for n, m in delta_s_modules(model).items() if names is None or n in names}
    directions = {}
    for name, module in modules.items():
        r = module.u.shape[1]
        q, upper = torch.linalg.qr(torch.randn(r, k, generator=generator, dtype=torch.float64))
        directions[name] = (q * upper.diagonal().sign()).T.to(module.u.dtype).contiguous()
    return HackBasis(
        directions,
        {name: torch.ones(k) for name in directions},
        {name: torch.ones(1, k) for name in directions},
        {name: torch.ones(k) for name in directions},
        {name: module.fingerprint for name, module in modules.items()},
    )


class Loop:
    """A trainer's inner loop over given gradients; `callback` None is a trainer without the method."""

    def __init__(self, model, callback, lr=1e-2):
        self.model, self.callback, self.n_steps = model, callback, 0
        self.deltas = delta_s_parameters(model)
        self.optimizer = torch.optim.AdamW(self.deltas.values(), lr=lr, weight_decay=0.0)
        if callback is not None:
            callback.on_train_begin(None, self.state, None, model=model)

    @property
    def state(self):
        return SimpleNamespace(global_step=self.n_steps)

    def step(self, grads):
        """One optimiser step; returns u = δ_after - δ_before."""
        before = self.delta()
        for name, delta in self.deltas.items():
            delta.grad = None if grads[name] is None else grads[name].clone()
        if self.callback is not None:
            self.callback.on_step_begin(None, self.state, None, model=self.model)
            self.callback.on_pre_optimizer_step(None, self.state, None, model=self.model)
        self.optimizer.step()
        if self.callback is not None:
            self.callback.on_optimizer_step(None, self.state, None, model=self.model, optimizer=self.optimizer)
        self.n_steps += 1
        return {name: after - before[name] for name, after in self.delta().items()}

    def delta(self):
        return {name: delta.detach().clone() for name, delta in self.deltas.items()}

    def grads(self):
        return {name: delta.grad.clone() for name, delta in self.deltas.items()}


def noise(model, seed):
    """Endless pure-noise gradients, each module with a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield {
            name: torch.randn(delta.shape, generator=generator, dtype=delta.dtype) * 2.0**i
            for i, (name, delta) in enumerate(delta_s_parameters(model).items())
        }


def hackward_amounts(v, x, gate):
    """How much of each row of V `gate` takes out of x."""
    c = v @ x
    return {"one_sided": c.clamp(min=0), "no_gate": c, "reverse": 2 * c.clamp(min=0)}[gate]


# --- the gradient --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
def test_the_gradient_is_projected_before_the_optimiser_sees_it(gate):
    model = build()
    basis = random_rows(model, k=3)
    callback = ProjectionCallback(basis, gate, overshoot=1.5)
    loop, grads = Loop(model, callback), next(noise(model, 1))
    loop.step(grads)
    for name, g in grads.items():
        v = basis.directions[name]
        expected = g - 1.5 * hackward_amounts(v, g, gate) @ v
        assert torch.allclose(loop.grads()[name], expected, rtol=0, atol=1e-12)
        assert not torch.allclose(expected, g)


@pytest.mark.parametrize("gate", GATES)
def test_the_logged_ratios_are_those_before_and_after_the_projection(gate):
    model = build()
    basis = random_rows(model, k=3, names=["0", "2"])  # module 1 is not projected and must not be measured
    callback = ProjectionCallback(basis, gate)
    loop, grads = Loop(model, callback), next(noise(model, 2))
    u = loop.step(grads)

    def share(x):
        c = torch.cat([basis.directions[n] @ x[n] for n in basis.directions])
        c = c if gate == "no_gate" else c.clamp(min=0)
        return (c.norm() / torch.cat([x[n] for n in basis.directions]).norm()).item()

    metrics = callback.metrics
    assert metrics["cin"] == pytest.approx(share(grads), rel=1e-12)
    assert metrics["cin"] > 0.05
    assert metrics["cout"] < 1e-12
    assert metrics["cup_in"] == pytest.approx(share({n: -x for n, x in u.items()}), rel=1e-10)
    assert metrics["cup_out"] == metrics["cup_in"]
    assert metrics["cin_null"] == pytest.approx(callback.projector.null(grads))
    assert metrics["fired"] == callback.projector.fired(grads) > 0
    assert metrics["overshoot"] == 1.0
    every = torch.cat([basis.directions[n] @ loop.delta()[n] for n in basis.directions])
    assert metrics["v_delta"] == pytest.approx(every.mean().item(), rel=1e-12)
    assert metrics["v_delta_leak"] == pytest.approx(sum(-x for x in every.tolist() if x < 0) / len(every), rel=1e-12)
    assert metrics["v_delta_drift"] == pytest.approx(sum(x for x in every.tolist() if x > 0) / len(every), rel=1e-12)
    assert metrics["v_delta_drift"] > 0
    assert (metrics["v_delta_leak"] > 0) == (gate != "reverse")  # turned round, the step leaks nothing here
    assert metrics["grad_norm_projected"] == pytest.approx(joint_norm(loop.grads()), rel=1e-12)


def test_a_module_without_a_kept_axis_trains_as_if_the_method_were_not_there():
    ours, plain = build(), build()
    loops = [
        Loop(ours, ProjectionCallback(random_rows(ours, k=3, names=["0"]), project_target="both", overshoot=2.0)),
        Loop(plain, None),
    ]
    source = noise(ours, 3)
    for grads in (next(source) for _ in range(5)):
        for loop in loops:
            loop.step(grads)
    for name in ("1", "2"):
        assert torch.equal(loops[0].delta()[name], loops[1].delta()[name])
    assert not torch.allclose(loops[0].delta()["0"], loops[1].delta()["0"])


def test_an_empty_basis_changes_nothing_and_logs_no_number():
    ours, plain = build(), build()
    callback = ProjectionCallback(random_rows(ours, k=3, names=[]), project_target="both", preserve_magnitude=True)
    loops, source = [Loop(ours, callback), Loop(plain, None)], noise(ours, 4)
    for grads in (next(source) for _ in range(3)):
        for loop in loops:
            loop.step(grads)
    assert all(torch.equal(loops[0].delta()[name], loops[1].delta()[name]) for name in loops[0].delta())
    assert [callback.metrics[name] for name in ("cin", "cin_null", "cout", "cup_in", "cup_out", "v_delta")] == [
        None
    ] * 6


@pytest.mark.parametrize("target", TARGETS)
def test_a_step_without_any_gradient_has_null_ratios_and_moves_nothing(target):
    model = build()
    callback = ProjectionCallback(random_rows(model, k=3), project_target=target, preserve_magnitude=True)
    loop = Loop(model, callback)
    u = loop.step({n: torch.zeros_like(d) for n, d in loop.deltas.items()})
    assert all(not x.any() for x in u.values())
    assert [callback.metrics[name] for name in ("cin", "cin_null", "cout", "cup_in", "cup_out")] == [None] * 5
    assert (callback.metrics["fired"], callback.metrics["v_delta"]) == (0, 0)


def test_gradients_that_never_reach_delta_s_are_no_silent_vanilla_run():
    model = build()
    loop = Loop(model, ProjectionCallback(random_rows(model, k=3)))
    with pytest.raises(RuntimeError, match="no gradient has reached delta_s"):
        loop.step(dict.fromkeys(loop.deltas))
    for delta in loop.deltas.values():
        delta.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        Loop(model, ProjectionCallback(random_rows(model, k=3)))


@pytest.mark.parametrize("target", ["grad", "update", "both"])
def test_preserve_magnitude_restores_the_joint_norm_of_what_is_projected(target):
    models = build(), build()
    basis = random_rows(models[0], k=3, names=["0", "1"])
    options = {"project_target": target, "preserve_magnitude": True}
    ours, plain = Loop(models[0], ProjectionCallback(basis, **options)), Loop(models[1], None)
    grads = next(noise(models[0], 5))
    u, raw = ours.step(grads), plain.step(grads)
    if target != "update":
        projected = {n: ours.grads()[n] for n in basis.directions}
        assert joint_norm(projected) == pytest.approx(joint_norm({n: grads[n] for n in basis.directions}), rel=1e-12)
        assert ours.callback.metrics["cout"] < 1e-12 < ours.callback.metrics["cin"]
    if target == "update":
        assert joint_norm({n: u[n] for n in basis.directions}) == pytest.approx(
            joint_norm({n: raw[n] for n in basis.directions}), rel=1e-12
        )
    if target != "grad":
        assert ours.callback.metrics["cup_out"] < 1e-12 < ours.callback.metrics["cup_in"]


# --- the update ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("overshoot", [1.0, 0.5])
def test_the_update_is_projected_by_the_same_gate_with_hackward_meaning_minus_v_u(gate, overshoot):
    """Same optimiser history on both sides, then one step with and without: u against its own equation."""
    ours, plain = build(), build()
    basis = random_rows(ours, k=3)
    callback = ProjectionCallback(basis, gate, overshoot=overshoot, project_target="update", measure_only=True)
    loops, source = [Loop(ours, callback), Loop(plain, None)], noise(ours, 6)
    for grads in (next(source) for _ in range(4)):
        for loop in loops:
            loop.step(grads)
    callback.measure_only = False
    grads = next(source)
    u, raw = (loop.step(grads) for loop in loops)
    for name, v in basis.directions.items():
        expected = raw[name] + overshoot * hackward_amounts(v, -raw[name], gate) @ v
        assert torch.allclose(u[name], expected, rtol=0, atol=1e-14)
        assert torch.equal(loops[0].grads()[name], grads[name])  # the gradient itself is left alone
        if overshoot == 1.0:
            leak = v @ u[name] if gate == "no_gate" else (-v @ u[name]).relu()
            assert leak.abs().max() < 1e-14
        if overshoot == 1.0 and gate == "reverse":
            assert torch.allclose(v @ u[name], (v @ raw[name]).abs(), rtol=0, atol=1e-14)
    assert callback.metrics["cup_in"] > 0.05
    assert callback.metrics["cout"] == callback.metrics["cin"] > 0.05
    if overshoot == 1.0:
        assert callback.metrics["cup_out"] < 1e-12


@pytest.mark.parametrize("gate", GATES)
def test_target_both_cleans_the_gradient_and_then_the_step(gate):
    model = build()
    callback = ProjectionCallback(random_rows(model, k=3), gate, project_target="both")
    loop, source = Loop(model, callback), noise(model, 7)
    for _ in range(5):
        grads = next(source)
        u = loop.step(grads)
        assert callback.metrics["cout"] < 1e-12 < callback.metrics["cin"]
        assert callback.metrics["cup_out"] < 1e-12
        for name, v in callback.basis.directions.items():
            assert (v @ u[name] if gate == "no_gate" else (-v @ u[name]).relu()).abs().max() < 1e-14
            expected = grads[name] - hackward_amounts(v, grads[name], gate) @ v
            assert torch.allclose(loop.grads()[name], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", ["one_sided", "no_gate"])
def test_a_clean_gradient_does_not_give_a_clean_adamw_step(gate):
    model = build()
    callback = ProjectionCallback(random_rows(model, k=2), gate)
    loop = Loop(model, callback)
    # Coordinates of very different size: Adam makes them alike, and so turns the gradient back into the span.
    lopsided = {
        n: torch.logspace(0, -3, d.numel(), dtype=d.dtype) * (-1) ** torch.arange(d.numel())
        for n, d in loop.deltas.items()
    }
    loop.step(lopsided)
    assert callback.metrics["cout"] < 1e-12
    assert callback.metrics["cup_in"] > 0.1
    assert callback.metrics["cup_out"] == callback.metrics["cup_in"]


def drift_on_pure_noise(gate="one_sided", n_steps=400, lr=3e-3, **options):
    """V δ of every axis after each of `n_steps` AdamW steps on gradients without any signal: (n_steps, axes)."""
    model = build(((64, 64),) * 2, dtype=torch.float32)
    basis = random_rows(model, k=4)
    callback = ProjectionCallback(basis, gate, **options)
    loop, source, trail = Loop(model, callback, lr=lr), noise(model, 8), []
    for _ in range(n_steps):
        loop.step(next(source))
        trail.append(torch.cat([v @ loop.deltas[n].detach() for n, v in basis.directions.items()]))
    trail = torch.stack(trail)
    assert callback.metrics["v_delta"] == pytest.approx(trail[-1].mean().item(), abs=1e-6)
    return trail


def test_one_sided_gates_drift_on_pure_noise_under_adamw_and_no_gate_on_the_update_does_not():
    vanilla = drift_on_pure_noise(measure_only=True)
    grad = drift_on_pure_noise(project_target="grad")
    update = drift_on_pure_noise(project_target="update")
    straight = drift_on_pure_noise("no_gate", project_target="update")
    drift = {name: run[-1].mean().item() for name, run in locals().items() if isinstance(run, torch.Tensor)}
    assert drift["grad"] > 2 * drift["update"] > 0, drift
    assert drift["update"] > 4 * abs(drift["vanilla"]), drift
    assert straight.abs().max() < 1e-5  # the span is left alone throughout, not only on average
    # One-sided on the update closes the leak, not the drift: V δ can only rise.
    assert (update.diff(dim=0) > -1e-6).all()
    assert (update[-1] > 0).all()
    assert (grad.diff(dim=0) < -1e-4).any()  # while a clean gradient leaks a little on the way
    # A steady drift, not a random walk. Of unit noise the gradient gate passes -E relu(N(0, 1)) = -1 / sqrt(2 pi) a
    # step and Adam keeps that at full size; Adam's own steps on noise have the variance (1 - b1) / (1 + b1) of one
    # gradient, so the update gate passes that much less.
    for run, spread in ((grad, 1.0), (update, (0.1 / 1.9) ** 0.5)):
        for n in (200, 400):
            assert run[n - 1].mean().item() == pytest.approx(3e-3 * n * spread / (2 * math.pi) ** 0.5, rel=0.15)


# --- δ held in the half-spaces of the basis ------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["one_sided", "no_gate"])
@pytest.mark.parametrize(("rate", "cap"), [(0.0, 0.0), (2e-3, 0.0), (5e-3, 0.02)])
def test_displacement_is_put_back_to_the_nearest_point_on_or_above_its_floor(gate, rate, cap):
    model, plain = build(), build()
    basis = random_rows(model, k=3, names=["0", "2"])
    loop = Loop(model, ProjectionCallback(basis, gate, project_target="displacement", hold_rate=rate, hold_cap=cap))
    free, source = Loop(plain, None), noise(model, 5)
    touched = 0
    for n in range(1, 30):
        floor = min(rate * n, cap) if cap else rate * n
        for delta, ours in zip(free.deltas.values(), loop.deltas.values(), strict=True):
            delta.data.copy_(ours.data)  # both begin where ours stands, with the same moments
        grads = next(source)
        free.step(grads)
        loop.step(grads)
        for name, g in grads.items():
            assert torch.equal(loop.grads()[name], g)  # Adam sees the gradient as it is
            after, expected = loop.deltas[name].detach(), free.deltas[name].detach()
            if name in basis.directions:
                v = basis.directions[name]
                short = floor - v @ expected
                expected = expected + (short if gate == "no_gate" else short.clamp(min=0)) @ v
                touched += (expected != free.deltas[name]).any().item()
                assert (v @ after - floor).min() > -1e-14
            assert torch.allclose(after, expected, rtol=0, atol=1e-14)
    assert touched > 10


def test_a_held_displacement_wanders_where_the_one_sided_update_drifts():
    # A random walk kept above 0 grows with the square root of the steps, a drift with their number.
    update = drift_on_pure_noise(project_target="update")
    held = drift_on_pure_noise(project_target="displacement")
    assert (held > -1e-6).all()
    assert held[-1].mean() < update[-1].mean() / 2
    pinned = drift_on_pure_noise("no_gate", project_target="displacement", hold_rate=1e-3)
    floors = 1e-3 * torch.arange(1, 401)
    assert (pinned - floors[:, None]).abs().max() < 1e-5


# --- the update, projected in the optimiser's metric -----------------------------------------------------------------


@pytest.mark.parametrize("gate", ["one_sided", "no_gate"])
def test_the_update_in_adams_metric_is_the_nearest_one_by_trying_every_set_of_axes(gate):
    model, plain = build(), build()
    basis = random_rows(model, k=3)
    callback = ProjectionCallback(basis, gate, project_target="update", update_metric="adam")
    loop, free, source = Loop(model, callback), Loop(plain, None), noise(model, 6)
    for _ in range(4):
        for delta, ours in zip(free.deltas.values(), loop.deltas.values(), strict=True):
            delta.data.copy_(ours.data)
        grads = next(source)
        u, plain_u = loop.step(grads), free.step(grads)
    assert callback.metrics["cup_out"] < 1e-12 < callback.metrics["cup_in"]
    for name, v in basis.directions.items():
        root = loop.optimizer.state[loop.deltas[name]]["exp_avg_sq"].sqrt()
        weights = root / root.square().mean().sqrt() + 1e-3
        nearest, least = None, math.inf
        for axes in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in range(4)):
            if gate == "no_gate" and len(axes) < 3:
                continue
            rows = v[list(axes)]
            pull = rows / weights
            x = plain_u[name] - pull.T @ torch.linalg.solve(pull @ rows.T, rows @ plain_u[name])
            distance = (weights * (x - plain_u[name]) ** 2).sum().item()
            if (v @ x).min() > -1e-14 and distance < least:
                nearest, least = x, distance
        assert torch.allclose(u[name], nearest, rtol=0, atol=1e-12)
    assert sum(not torch.allclose(u[name], plain_u[name]) for name in basis.directions) > 1


def test_equal_second_moments_make_adams_metric_the_euclidean_one():
    ours, theirs = build(), build()
    basis = random_rows(ours, k=3)
    loops = [
        Loop(m, ProjectionCallback(basis, "no_gate", project_target="update", update_metric=metric))
        for m, metric in ((ours, "adam"), (theirs, "euclidean"))
    ]
    grads = {name: g.sign() for name, g in next(noise(ours, 7)).items()}
    a, b = (loop.step(grads) for loop in loops)
    assert all(torch.allclose(a[name], b[name], rtol=0, atol=1e-14) for name in grads)


# --- the student's rows alone -----------------------------------------------------------------------------------------


def test_the_students_part_alone_is_projected():
    model = build()
    basis = random_rows(model, k=3)
    callback = ProjectionCallback(basis, project_rows="student")
    with pytest.raises(InputError, match="tells sources apart"):  # now, and not after a whole generation
        Loop(model, callback)
    source = noise(model, 9)
    student, teacher = next(source), next(source)
    callback.student_grads = lambda: student
    loop = Loop(model, callback)
    loop.step({name: g + teacher[name] for name, g in student.items()})
    for name, v in basis.directions.items():
        expected = teacher[name] + student[name] - hackward_amounts(v, student[name], "one_sided") @ v
        assert torch.allclose(loop.grads()[name], expected, rtol=0, atol=1e-12)


# --- what is measured must not be touched -----------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_measure_only_touches_nothing_bit_for_bit(target):
    ours, plain = build(dtype=torch.float32), build(dtype=torch.float32)
    basis = random_rows(ours, k=3)
    options = {"project_target": target, "measure_only": True, "overshoot": 3.0, "preserve_magnitude": True}
    callback = ProjectionCallback(basis, "reverse", match=random_rows(ours, k=2, seed=9), **options)
    loops = [Loop(ours, callback), Loop(plain, None)]
    generator = torch.Generator().manual_seed(10)
    state = torch.get_rng_state()
    for _ in range(20):
        # A live loss, so that a touched δ would be felt by every later gradient.
        x = torch.randn(16, 9, generator=generator)
        for loop in loops:
            loss = loop.model(x).square().mean()
            loop.step(dict(zip(loop.deltas, torch.autograd.grad(loss, list(loop.deltas.values())), strict=True)))
        for name, delta in loops[0].deltas.items():
            assert torch.equal(delta, loops[1].deltas[name])
            assert torch.equal(delta.grad, loops[1].deltas[name].grad)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(delta.any() for delta in loops[0].delta().values())
    assert callback.metrics["cin"] == callback.metrics["cout"] > 0
    assert callback.metrics["cup_in"] == callback.metrics["cup_out"] > 0


# --- matched controls ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_match_takes_out_the_share_of_the_gradient_that_the_other_basis_would(gate, seed):
    models = build(), build()
    real, control = random_rows(models[0], k=3, seed=11), random_rows(models[0], k=3, seed=12 + seed)
    theirs = Loop(models[0], ProjectionCallback(real, gate))
    ours = Loop(models[1], ProjectionCallback(control, gate, match=real))
    grads = next(noise(models[0], 20 + seed))
    removed = []
    for loop in (theirs, ours):
        loop.step(grads)
        removed.append(joint_norm({n: grads[n] - g for n, g in loop.grads().items()}) / joint_norm(grads))
    assert removed[1] == pytest.approx(removed[0], rel=1e-12)
    assert removed[0] > 0.05
    assert abs(ours.callback.metrics["overshoot"] - 1) > 1e-3
    for name, g in grads.items():  # along its own directions, not the real ones
        taken = g - ours.grads()[name]
        v = control.directions[name]
        assert torch.allclose(v.T @ (v @ taken), taken, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_match_of_the_update_takes_out_as_much_of_the_update(gate):
    models = build(), build(), build()
    real, control = random_rows(models[0], k=3, seed=11), random_rows(models[0], k=3, seed=12)
    grads = next(noise(models[0], 30))
    raw = Loop(models[2], None).step(grads)
    removed = []
    for model, basis, match in ((models[0], real, None), (models[1], control, real)):
        u = Loop(model, ProjectionCallback(basis, gate, match=match, project_target="update")).step(grads)
        removed.append(joint_norm({n: u[n] - raw[n] for n in u}))
    assert removed[1] == pytest.approx(removed[0], rel=1e-10)
    assert removed[0] > 0


def test_match_survives_a_step_without_gradient():
    model = build()
    callback = ProjectionCallback(random_rows(model, k=3), match=random_rows(model, k=3, seed=1))
    u = Loop(model, callback).step({n: torch.zeros_like(d) for n, d in delta_s_parameters(model).items()})
    assert all(not x.any() for x in u.values())


# --- refresh ---------------------------------------------------------------------------------------------------------


def test_refresh_comes_every_n_optimiser_steps_and_logs_the_overlap_with_what_it_replaces():
    model = build()
    first = random_rows(model, k=3)
    made_at, made = [], []

    def refresh():
        made_at.append(loop.n_steps)
        # A basis that turns the first of three rows out, moves to other modules, and keeps the rest.
        half = random_rows(model, k=3, seed=len(made) * 5, names=["0", "1"])
        rows = {name: v[1:] for name, v in half.directions.items()}
        made.append(HackBasis(rows, half.singular_values, half.coefficients, half.spectrum, half.fingerprints))
        return made[-1]

    callback = ProjectionCallback(first, "no_gate", refresh_every=3, refresh=refresh)
    loop, source = Loop(model, callback), noise(model, 13)
    for step in range(8):
        grads = next(source)
        loop.step(grads)
        refreshed = "refresh/overlap" in callback.metrics
        assert refreshed == (step in (3, 6))
        if step == 3:
            assert callback.metrics["refresh/overlap"] == pytest.approx(
                1.0, rel=1e-12
            )  # 2 of 2 rows lie in the old span
            nulls = [3 / callback.basis.directions[n].shape[1] for n in ("0", "1")]  # the larger k is 3
            assert callback.metrics["refresh/overlap_null"] == pytest.approx(sum(nulls) / 2)
            assert (callback.metrics["refresh/modules_came"], callback.metrics["refresh/modules_went"]) == (0, 1)
        if step == 6:  # other rows: the second basis stands apart from the first two
            assert callback.metrics["refresh/overlap"] == pytest.approx(made[1].overlap(made[0]).mean, rel=1e-12)
            assert callback.metrics["refresh/overlap_first"] == pytest.approx(made[1].overlap(first).mean, rel=1e-12)
            assert callback.metrics["refresh/overlap_first"] < 0.9
            assert callback.metrics["refresh/overlap"] != callback.metrics["refresh/overlap_first"]
        basis = first if step < 3 else made[0] if step < 6 else made[1]
        assert callback.basis is basis
        for name, g in grads.items():  # and it is the new basis that projects, from that very step on
            v = basis.directions.get(name)
            expected = g if v is None else g - (v @ g) @ v
            assert torch.allclose(loop.grads()[name], expected, rtol=0, atol=1e-12)
    assert made_at == [3, 6]
    assert callback.projector.gate == "no_gate"


def test_without_refresh_every_the_basis_stays():
    model = build()
    callback = ProjectionCallback(random_rows(model, k=3), refresh=lambda: pytest.fail("refreshed"))
    loop, source = Loop(model, callback), noise(model, 14)
    for _ in range(3):
        loop.step(next(source))


# --- refusals and logging --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"gate": "two_sided"}, ("two_sided", "one_sided, no_gate, reverse")),
        ({"project_target": "grads"}, ("grads", "grad, update, both, displacement")),
        ({"refresh_every": 2}, ("refresh_every=2", "refresh function")),
        ({"refresh_every": -1, "refresh": lambda: None}, ("refresh_every=-1", "positive")),
    ],
)
def test_bad_arguments_are_refused_in_one_line(options, names):
    with pytest.raises(InputError) as error:
        ProjectionCallback(random_rows(build(), k=3), **options)
    assert all(name in str(error.value) for name in names)
    assert "\n" not in str(error.value)


def test_a_foreign_basis_is_refused_before_the_first_step():
    model, foreign = build(), build(seed=1)
    own = random_rows(model, k=3)
    Loop(model, ProjectionCallback(own, match=own))
    for callback in (
        ProjectionCallback(random_rows(foreign, k=3)),
        ProjectionCallback(own, match=random_rows(foreign, k=3)),
        ProjectionCallback(random_rows(build((*SHAPES, (6, 6))), k=3)),
        ProjectionCallback(random_rows(build(((9, 5), *SHAPES[1:])), k=3)),
    ):
        with pytest.raises(InputError, match="does not fit this model"):
            Loop(model, callback)


def test_the_log_of_a_step_gets_the_metrics_and_no_nulls():
    model = build()
    callback = ProjectionCallback(random_rows(model, k=3))
    loop, source = Loop(model, callback), noise(model, 15)
    loop.step(next(source))
    logs, state = {"loss": 1.0}, SimpleNamespace(global_step=1, log_history=[{"loss": 1.0, "step": 1}])
    callback.on_log(None, state, None, logs=logs)
    assert logs == {"loss": 1.0} | {f"projection/{name}": value for name, value in callback.metrics.items()}
    loop.step({n: torch.zeros_like(d) for n, d in loop.deltas.items()})
    logs = {"loss": 0.0}
    callback.on_log(None, state, None, logs=logs)
    assert "projection/cin" not in logs
    assert "projection/fired" in logs
    summary = {"train_runtime": 1.0}
    callback.on_log(None, state, None, logs=summary)
    assert summary == {"train_runtime": 1.0}
