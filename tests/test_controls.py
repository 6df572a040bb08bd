"""METHOD 6: every control takes the real basis's modules and its k module by module, and has no floor of its own."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from projected_grpo.basis import BasisInfo, HackBasis
from projected_grpo.controls import flipped_basis, random_basis
from projected_grpo.errors import InputError

N_PAIRS = 9
SHAPES = {"q": 16, "k": 8, "weak": 8, "v": 12}


def pair_grads(seed: int, n: int = N_PAIRS) -> dict[str, torch.Tensor]:
    """Gradients with a common hack-ward pull, so that votes are clear; one module is weak."""
    generator = torch.Generator().manual_seed(seed)
    grads = {}
    for name, r in SHAPES.items():
        pull = torch.randn(r, generator=generator)
        grads[name] = torch.randn(n, r, generator=generator) + torch.linspace(0.5, 2, n)[:, None] * pull
    grads["weak"] *= 1e-4
    return grads


PRINTS = {name: torch.full((40,), i, dtype=torch.uint8) for i, name in enumerate(SHAPES)}
INFO = BasisInfo(pair_set="hacks", pair_set_sha256="ab" * 32, n_pairs=N_PAIRS, model="m", temperature=0.7)


def real_basis(seed: int = 0, top_k: int = 3, drop: float = 0.3) -> HackBasis:
    return HackBasis.from_pair_gradients(pair_grads(seed), PRINTS, INFO, top_k, drop)


@pytest.fixture(scope="module")
def real():
    basis = real_basis()
    sizes = {name: len(v) for name, v in basis.directions.items()}
    assert "weak" not in sizes  # the floor bites: whole modules
    assert len(set(sizes.values())) > 1  # and single axes
    return basis


def one_axis(r: int, k: int) -> HackBasis:
    rows = torch.eye(r)[:k]
    ones = torch.ones(k)
    return HackBasis({"m": rows}, {"m": ones}, {"m": ones[None]}, {"m": ones}, {"m": PRINTS["q"]}, INFO)


def sizes(basis: HackBasis) -> dict[str, tuple[int, int]]:
    return {name: tuple(v.shape) for name, v in basis.directions.items()}


def assert_orthonormal(basis: HackBasis) -> None:
    for v in basis.directions.values():
        assert v.dtype == torch.float32
        torch.testing.assert_close(v @ v.T, torch.eye(len(v)), rtol=0, atol=1e-5)


# --- random ----------------------------------------------------------------------------------------------------------


def test_random_has_orthonormal_rows_in_the_real_modules_k_by_k(real):
    control = random_basis(real, seed=3)
    assert sizes(control) == sizes(real)
    assert list(control.directions) == list(real.directions)
    assert_orthonormal(control)
    assert all(torch.equal(control.fingerprints[name], real.fingerprints[name]) for name in real.directions)
    assert control.info == replace(real.info, kind="random", seed=3)


def test_random_keeps_no_trace_of_the_pairs(real):
    control = random_basis(real, seed=3)
    assert not any(c.any() for c in control.coefficients.values())
    assert not any(s.any() for s in control.singular_values.values())
    other = random_basis(replace(real, directions={n: v.flip(0) for n, v in real.directions.items()}), seed=3)
    assert all(torch.equal(other.directions[name], v) for name, v in control.directions.items())


def test_random_catches_k_over_r_of_any_vector_as_haar_rows_do():
    r, k, draws = 10, 3, 500
    template = one_axis(r, k)
    v = torch.stack([random_basis(template, seed).directions["m"] for seed in range(draws)]).double()
    for x in (torch.eye(r, dtype=torch.float64)[0], torch.full((r,), r**-0.5, dtype=torch.float64)):
        shares = (v @ x).square().sum(-1)
        assert abs(shares.mean() - k / r) < 4 * shares.std() / math.sqrt(draws)
    # Every row points everywhere: without the signs of R's diagonal, QR leaves the first coordinates one-sided.
    assert (v.mean(0).abs() < 4 * (1 / (r * draws)) ** 0.5).all()
    # Rows are as spread as the sphere: the second moment of each is I / r.
    second = torch.einsum("dki,dkj->kij", v, v) / draws
    assert (second - torch.eye(r, dtype=torch.float64) / r).abs().max() < 0.05


def test_random_draws_each_module_on_its_own():
    template = one_axis(10, 3)
    rows = template.directions["m"]
    twice = replace(template, directions={"a": rows, "b": rows}, singular_values={}, coefficients={})
    control = random_basis(twice, seed=0)
    assert not torch.allclose(control.directions["a"], control.directions["b"], atol=0.1)


@pytest.mark.parametrize("make", [random_basis, flipped_basis])
def test_a_control_depends_on_its_seed_and_on_nothing_else(real, make):
    torch.manual_seed(0)
    first = make(real, 5)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    again = make(real, 5)
    assert all(torch.equal(first.directions[name], again.directions[name]) for name in real.directions)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # no draw from the global generator
    others = [make(real, seed) for seed in range(6, 14)]
    assert any(not torch.equal(o.directions[n], first.directions[n]) for o in others for n in real.directions)


# --- flipped ---------------------------------------------------------------------------------------------------------


def swaps_of(real: HackBasis, control: HackBasis) -> torch.Tensor:
    """The pairs' swaps, ±1, read off the control: a coefficient changes by its pair's swap times its row's turn."""
    found = []
    for name, v in real.directions.items():
        turns = (control.directions[name] * v).sum(1).round()
        ratio = control.coefficients[name] / real.coefficients[name]
        found.append(ratio / turns)
    swaps = torch.cat(found, dim=1)
    assert torch.equal(swaps, swaps[:, :1].expand_as(swaps))  # a pair is swapped in all modules or in none
    assert set(swaps[:, 0].tolist()) <= {-1.0, 1.0}
    return swaps[:, 0]


def test_flipped_keeps_the_real_span_and_turns_rows_only(real):
    control = flipped_basis(real, seed=1)
    assert sizes(control) == sizes(real)
    for name, v in real.directions.items():
        for row, turned in zip(v, control.directions[name], strict=True):
            assert torch.equal(turned, row) or torch.equal(turned, -row)
        assert torch.equal(control.singular_values[name], real.singular_values[name])
    assert control.overlap(real).mean == pytest.approx(1.0, rel=1e-6)
    assert control.info == replace(real.info, kind="flipped", seed=1)


@pytest.mark.parametrize("seed", range(8))
def test_flipped_is_the_basis_of_pairs_whose_sides_are_swapped(real, seed):
    control = flipped_basis(real, seed)
    swaps = swaps_of(real, control)
    swapped = {name: grads * swaps[:, None] for name, grads in pair_grads(0).items()}
    slow = HackBasis.from_pair_gradients(swapped, PRINTS, INFO, like=real)
    assert sizes(slow) == sizes(control)
    for name, v in control.directions.items():
        torch.testing.assert_close(v, slow.directions[name], rtol=0, atol=1e-5)
        torch.testing.assert_close(control.coefficients[name], slow.coefficients[name], rtol=1e-4, atol=1e-4)
        assert (control.coefficients[name].sign().sum(0) >= 0).all()


def test_flipped_swaps_each_pair_with_probability_one_half(real):
    swaps = torch.stack([swaps_of(real, flipped_basis(real, seed)) for seed in range(200)])
    assert (swaps.mean(0).abs() < 4 / math.sqrt(200)).all()
    pairwise = swaps.T @ swaps / 200 - torch.eye(N_PAIRS)
    assert pairwise.abs().max() < 4.5 / math.sqrt(200)


def test_flipped_turns_the_leading_rows_of_the_real_basis_about_half_of_the_time(real):
    turned = [
        (flipped_basis(real, seed).directions[name][0] * v[0]).sum().item() < 0
        for seed in range(100)
        for name, v in list(real.directions.items())[:1]
    ]
    assert 0.25 < np.mean(turned) < 0.75


# --- placebo ---------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(1, 10**6), scale=st.sampled_from([1e-6, 1.0, 1e4]))
def test_a_placebo_copies_modules_and_k_without_a_floor_of_its_own(real, seed, scale):
    grads = {name: scale * g for name, g in pair_grads(seed).items()}
    grads["q"] = grads["q"] * 1e-5  # far below any floor, and kept all the same
    info = replace(INFO, pair_set="placebo_style", pair_set_sha256="cd" * 32, floor=3.0, drop_bottom_frac=0.5)
    control = HackBasis.from_pair_gradients(grads, PRINTS, info, top_k=7, drop_bottom_frac=0.9, like=real)
    assert sizes(control) == sizes(real)
    assert_orthonormal(control)
    assert (control.info.kind, control.info.pair_set) == ("placebo_style", "placebo_style")
    assert (control.info.top_k, control.info.drop_bottom_frac, control.info.floor) == (real.info.top_k, 0.0, 0.0)
    own = HackBasis.from_pair_gradients(grads, PRINTS, info, top_k=3, drop_bottom_frac=0.0)
    for name, v in control.directions.items():
        assert torch.equal(v, own.directions[name][: len(v)])  # the placebo's own top axes, oriented by its own pairs
    assert set(control.spectrum) == set(SHAPES)


def test_a_placebo_with_too_few_pairs_for_the_real_k_is_refused(real):
    """Its k must be the real one's, module by module: two pairs cannot fill three axes."""
    few = {name: g[:2] for name, g in pair_grads(4).items()}
    assert max(len(v) for v in real.directions.values()) == 3
    with pytest.raises(InputError):
        HackBasis.from_pair_gradients(few, PRINTS, replace(INFO, n_pairs=2, pair_set="placebo_style"), like=real)
