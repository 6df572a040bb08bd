"""METHOD 4 and 5 on bare gradients: the gates, the ratios, their null. Slow loops that anyone can check, float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from projected_grpo.basis import HackBasis
from projected_grpo.projector import Projector, hackward_part, joint_norm, project

GATES = ("one_sided", "no_gate", "reverse")
EDGES = settings(max_examples=40, derandomize=True, deadline=None)


def haar(k, r, generator):
    """(k, r), orthonormal rows, uniform over all such."""
    q, upper = torch.linalg.qr(torch.randn(r, k, generator=generator, dtype=torch.float64))
    return (q * upper.diagonal().sign()).T.contiguous()


def basis_of(directions):
    """A basis that is nothing but its directions."""
    return HackBasis(
        directions,
        {name: torch.ones(len(v)) for name, v in directions.items()},
        {name: torch.ones(1, len(v)) for name, v in directions.items()},
        {name: torch.ones(len(v)) for name, v in directions.items()},
        {},
    )


def projector_of(directions, gate="one_sided"):
    return Projector(basis_of(directions), gate)


def problem(seed, shapes, scale=1.0, dtype=torch.float64):
    """Directions and gradients of modules `m0`, `m1`, ... of the given (k, r), with very different energies."""
    generator = torch.Generator().manual_seed(seed)
    v = {f"m{i}": haar(k, r, generator) for i, (k, r) in enumerate(shapes)}
    grads = {
        f"m{i}": torch.randn(r, generator=generator, dtype=torch.float64) * scale * 3.0**i
        for i, (_, r) in enumerate(shapes)
    }
    return {name: x.to(dtype) for name, x in v.items()}, {name: g.to(dtype) for name, g in grads.items()}


def slow_project(g, v, gate, overshoot):
    """The equations of METHOD 4, one row and one coordinate at a time."""
    after = g.tolist()
    for row in v.tolist():
        c = math.fsum(a * b for a, b in zip(row, g.tolist(), strict=True))
        amount = {"one_sided": max(c, 0.0), "no_gate": c, "reverse": 2 * max(c, 0.0)}[gate]
        for i, x in enumerate(row):
            after[i] -= overshoot * amount * x
    return after


def slow_share(v, grads, gate):
    """‖relu(V g)‖ / ‖g‖ of the concatenated vectors, one number at a time."""
    hits, energy = [], []
    for name, g in grads.items():
        for row in v[name].tolist():
            c = math.fsum(a * b for a, b in zip(row, g.tolist(), strict=True))
            hits.append(c * c if gate == "no_gate" or c > 0 else 0.0)
        energy += [x * x for x in g.tolist()]
    return math.sqrt(math.fsum(hits) / math.fsum(energy))


@st.composite
def cases(draw):
    """A basis and a gradient of one module: any k <= r, any scale, also gradients inside or outside of the span."""
    r = draw(st.integers(1, 9))
    k = draw(st.integers(1, r))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    v = haar(k, r, generator)
    g = torch.randn(r, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["any", "inside", "outside", "hack-ward", "anti-hack", "zero"]))
    g = {
        "any": g,
        "inside": v.T @ (v @ g),
        "outside": g - v.T @ (v @ g),
        "hack-ward": v.T @ (v @ g).abs(),
        "anti-hack": -v.T @ (v @ g).abs(),
        "zero": g * 0,
    }[kind]
    return v, g * 10.0 ** draw(st.integers(-12, 12))


def close(a, b, like, tol=1e-12):
    return torch.allclose(a, b, rtol=0, atol=tol * like.norm().item())


# --- the gates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("overshoot", [1.0, 0.3, 2.5])
def test_each_gate_is_its_equation_row_by_row(gate, overshoot):
    directions, grads = problem(0, [(1, 1), (3, 8), (5, 5), (2, 30)])
    after = projector_of(directions, gate).project(grads, overshoot)
    for name, g in grads.items():
        slow = torch.tensor(slow_project(g, directions[name], gate, overshoot), dtype=torch.float64)
        assert torch.allclose(after[name], slow, rtol=0, atol=1e-13 * g.norm().item())
        assert torch.allclose(after[name], project(g, directions[name], gate, overshoot), rtol=0, atol=1e-14 * g.norm())
    assert any((directions[n] @ g > 0).any() for n, g in grads.items())
    assert any((directions[n] @ g < 0).any() for n, g in grads.items())


@EDGES
@given(cases())
def test_after_no_gate_v_g_is_zero_and_the_gate_is_idempotent(case):
    v, g = case
    once = project(g, v, "no_gate")
    assert close(v @ once, torch.zeros(len(v), dtype=torch.float64), g)
    assert close(project(once, v, "no_gate"), once, g)
    assert close(once, g - v.T @ (v @ g), g)


@EDGES
@given(cases())
def test_after_one_sided_relu_v_g_is_zero_the_rest_is_left_and_the_gate_is_idempotent(case):
    v, g = case
    once = project(g, v, "one_sided")
    assert close((v @ once).relu(), torch.zeros(len(v), dtype=torch.float64), g)
    assert close(project(once, v, "one_sided"), once, g)
    assert close(v @ once, (v @ g).clamp(max=0), g)  # anti-hack coefficients are untouched
    assert close(once - v.T @ (v @ once), g - v.T @ (v @ g), g)  # and so is everything outside of the span


@EDGES
@given(cases())
def test_reverse_turns_the_hackward_part_round_and_leaves_the_rest(case):
    v, g = case
    turned = project(g, v, "reverse")
    assert close(v @ turned, -(v @ g).abs(), g)
    assert close(turned - v.T @ (v @ turned), g - v.T @ (v @ g), g)
    assert abs(turned.norm() - g.norm()) <= 1e-12 * g.norm()


@EDGES
@given(cases(), st.sampled_from(GATES), st.floats(0, 4))
def test_overshoot_scales_what_is_removed(case, gate, overshoot):
    v, g = case
    removed = g - project(g, v, gate, overshoot)
    assert close(removed, overshoot * (g - project(g, v, gate)), g)
    assert close(removed, overshoot * hackward_part(g, v, gate), g)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("overshoot", [1.0, 1.5])
def test_preserve_magnitude_restores_the_norm_over_all_projected_modules_together(gate, overshoot):
    directions, grads = problem(1, [(2, 6), (3, 12), (4, 9)])
    projector = projector_of(directions, gate)
    plain, kept = projector.project(grads, overshoot), projector.project(grads, overshoot, preserve_magnitude=True)
    assert joint_norm(kept) == pytest.approx(joint_norm(grads), rel=1e-12)
    # One factor for all modules: no module's own norm is restored.
    scale = joint_norm(grads) / joint_norm(plain)
    for name in grads:
        assert torch.allclose(kept[name], plain[name] * scale, rtol=1e-12, atol=0)
    if gate != "reverse":
        assert scale > 1.01
        assert any(abs(kept[n].norm() / grads[n].norm() - 1) > 0.01 for n in grads)
    if overshoot == 1.0:
        assert projector.hack_share(kept) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gate", ["one_sided", "no_gate"])
def test_preserve_magnitude_does_not_blow_rounding_up_to_a_step_along_the_hack(gate, dtype):
    """A gradient that lies wholly inside the removed span leaves only rounding, which has no norm to restore."""
    for seed in range(20):
        directions, grads = problem(seed, [(4, 4), (3, 10)], dtype=dtype)
        hackward = {name: directions[name].T @ (directions[name] @ g).abs() for name, g in grads.items()}
        after = projector_of(directions, gate).project(hackward, preserve_magnitude=True)
        for name, v in directions.items():
            assert (v @ after[name]).abs().max() <= 1e-5 * joint_norm(hackward)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("preserve_magnitude", [False, True])
def test_a_zero_gradient_stays_zero_and_its_ratios_are_null(gate, preserve_magnitude):
    directions, grads = problem(2, [(2, 6), (3, 12)])
    zero = {name: torch.zeros_like(g) for name, g in grads.items()}
    projector = projector_of(directions, gate)
    after = projector.project(zero, overshoot=3.0, preserve_magnitude=preserve_magnitude)
    assert all(torch.equal(after[name], zero[name]) for name in grads)
    assert projector.hack_share(zero) is None
    assert projector.null(zero) is None
    assert projector.fired(zero) == 0


def test_a_module_without_a_kept_axis_is_neither_projected_nor_measured():
    directions, grads = problem(3, [(2, 6), (3, 12)])
    projector, others = projector_of(directions), {"unprojected": torch.full((5,), 1e6, dtype=torch.float64)}
    assert projector.project(grads | others).keys() == grads.keys()
    for measure in (projector.hack_share, projector.null, projector.fired):
        assert measure(grads | others) == measure(grads)
    assert torch.equal(projector.coordinates(grads | others), projector.coordinates(grads))


@pytest.mark.parametrize("gate", GATES)
def test_an_empty_basis_projects_nothing_and_measures_nothing(gate):
    grads = {"m0": torch.ones(4)}
    projector = projector_of({}, gate)
    assert projector.project(grads, preserve_magnitude=True) == {}
    assert projector.hack_share(grads) is None
    assert projector.null(grads) is None
    assert not projector.fired(grads)
    assert len(projector.coordinates(grads)) == 0


# --- the ratios ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
def test_cin_is_the_ratio_of_the_concatenated_norms(gate):
    directions, grads = problem(4, [(1, 3), (4, 10), (6, 7)])
    share = projector_of(directions, gate).hack_share(grads)
    assert share == pytest.approx(slow_share(directions, grads, gate), rel=1e-12)
    mean_of_ratios = sum(slow_share(directions, {n: g}, gate) for n, g in grads.items()) / len(grads)
    assert abs(share - mean_of_ratios) > 0.02


def test_no_gate_counts_the_anti_hack_part_and_one_sided_does_not():
    v = {"m": torch.eye(2, 4, dtype=torch.float64)}
    g = {"m": torch.tensor([3.0, -4.0, 0.0, 12.0], dtype=torch.float64)}
    assert projector_of(v, "one_sided").hack_share(g) == pytest.approx(3 / 13)
    assert projector_of(v, "reverse").hack_share(g) == pytest.approx(3 / 13)
    assert projector_of(v, "no_gate").hack_share(g) == pytest.approx(5 / 13)


@pytest.mark.parametrize("gate", GATES)
def test_cout_is_zero_after_the_gate(gate):
    directions, grads = problem(5, [(2, 6), (3, 12), (5, 5)])
    projector = projector_of(directions, gate)
    assert projector.hack_share(grads) > 0.1
    assert projector.hack_share(projector.project(grads)) < 1e-12


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.integers(-25, 25), st.sampled_from(GATES))
def test_ratios_do_not_depend_on_the_gradients_scale_in_float32(exponent, gate):
    directions, grads = problem(6, [(2, 6), (3, 12)], dtype=torch.float32)
    scaled = {name: g * 10.0**exponent for name, g in grads.items()}
    projector = projector_of(directions, gate)
    assert projector.hack_share(scaled) == pytest.approx(projector.hack_share(grads), rel=1e-5)
    assert projector.null(scaled) == pytest.approx(projector.null(grads), rel=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_the_null_is_the_rms_of_cin_over_directions_without_meaning(gate):
    """Monte Carlo over Haar-random V, one fixed gradient whose energy lies unevenly over unequal modules."""
    shapes = {"wide": (4, 40), "small": (3, 6), "thin": (1, 12)}
    generator = torch.Generator().manual_seed(7)
    scales = {"wide": 1.0, "small": 4.0, "thin": 0.5}
    grads = {n: scales[n] * torch.randn(r, generator=generator, dtype=torch.float64) for n, (_, r) in shapes.items()}

    def draw():
        return projector_of({n: haar(k, r, generator) for n, (k, r) in shapes.items()}, gate)

    null = draw().null(grads)
    squares = torch.tensor([draw().hack_share(grads) ** 2 for _ in range(1500)], dtype=torch.float64)
    error = squares.std().item() / len(squares) ** 0.5
    assert abs(squares.mean().item() - null**2) < 4 * error
    # The draws are many enough to tell the null from its likely mistakes: axes pooled, or modules counted alike.
    sides = 1 if gate == "no_gate" else 2
    pooled = sum(k for k, _ in shapes.values()) / sum(r for _, r in shapes.values()) / sides
    alike = sum(k / r for k, r in shapes.values()) / len(shapes) / sides
    assert min(abs(squares.mean().item() - wrong) for wrong in (pooled, alike)) > 8 * error


def test_the_null_of_a_single_energetic_module_is_that_modules():
    directions, grads = problem(8, [(2, 6), (3, 12)])
    grads["m1"] = torch.zeros_like(grads["m1"])
    assert projector_of(directions, "one_sided").null(grads) == pytest.approx((2 / (2 * 6)) ** 0.5)
    assert projector_of(directions, "reverse").null(grads) == pytest.approx((2 / (2 * 6)) ** 0.5)
    assert projector_of(directions, "no_gate").null(grads) == pytest.approx((2 / 6) ** 0.5)


def test_fired_is_the_share_of_modules_from_which_the_gate_takes_something():
    v = torch.eye(2, 5, dtype=torch.float64)
    directions = dict.fromkeys(("hack-ward", "anti-hack", "outside", "zero"), v)
    grads = {
        "hack-ward": torch.tensor([-1.0, 2.0, 0.0, 0.0, 0.0], dtype=torch.float64),
        "anti-hack": torch.tensor([-1.0, -2.0, 1.0, 0.0, 0.0], dtype=torch.float64),
        "outside": torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0], dtype=torch.float64),
        "zero": torch.zeros(5, dtype=torch.float64),
    }
    assert projector_of(directions, "one_sided").fired(grads) == 0.25
    assert projector_of(directions, "reverse").fired(grads) == 0.25
    assert projector_of(directions, "no_gate").fired(grads) == 0.5


def test_coordinates_are_v_x_of_every_kept_axis():
    directions, vectors = problem(9, [(1, 3), (5, 9)])
    every = [math.fsum((row * vectors[name]).tolist()) for name, v in directions.items() for row in v]
    assert len(every) == 6
    assert sorted(projector_of(directions).coordinates(vectors).tolist()) == pytest.approx(sorted(every), rel=1e-12)


def test_joint_norm_is_the_norm_of_the_concatenation_in_float64():
    parts = {"a": torch.tensor([3e25, 0.0]), "b": torch.tensor([4e25])}  # their squares overflow float32
    assert joint_norm(parts) == pytest.approx(5e25, rel=1e-6)
    assert joint_norm({}) == 0
