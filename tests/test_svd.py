"""METHOD 1, the decomposition: right, in float64, the same bits from the cache, and never trusted when damaged."""

import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from projected_grpo import svd
from projected_grpo.svd import (
    FINGERPRINT_BYTES,
    GRAM_MAX_ASPECT,
    PROBE_TOLERANCE,
    decompose,
    factors_of,
    fingerprint_mismatch,
    hash_weight,
    pack_fingerprint,
    probe_factors,
    svd_factors,
    unpack_fingerprint,
)

few = settings(max_examples=30, deadline=None, derandomize=True)
KINDS = ("full", "rank_deficient", "zero", "degenerate", "one_hot")
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def make_weight(kind, shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "rank_deficient":
        full = full[:, :1] @ full[:1]
    elif kind == "zero":
        full = torch.zeros(shape, dtype=torch.float64)
    elif kind == "degenerate":  # every singular value is 0.5
        u, _, vh = torch.linalg.svd(full, full_matrices=False)
        full = 0.5 * (u @ vh)
    elif kind == "one_hot":
        full = torch.zeros(shape, dtype=torch.float64)
        full[-1, 0] = -3.0
    return full.to(dtype)


def same_bits(a, b):
    return a.weight_hash == b.weight_hash and all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("u", "s", "vh"))


@pytest.fixture
def warnings_logged(monkeypatch):
    lines = []
    monkeypatch.setattr(svd, "logger", SimpleNamespace(warning=lines.append))
    return lines


@pytest.fixture
def no_svd(monkeypatch):
    """From `no_svd()` on, computing an SVD is an error."""

    def refuse(*_, **__):
        raise AssertionError("the SVD was computed again")

    return lambda: monkeypatch.setattr(svd, "decompose", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("svd")


# --- the factors -----------------------------------------------------------------------------------------------------


@few
@given(
    kind=st.sampled_from(KINDS),
    shape=shapes,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 99),
)
@example(kind="zero", shape=(1, 1), dtype=torch.float32, seed=0)
@example(kind="degenerate", shape=(6, 6), dtype=torch.float32, seed=0)
@example(kind="rank_deficient", shape=(9, 2), dtype=torch.bfloat16, seed=0)
def test_thin_svd_in_float32_rebuilds_every_kind_of_weight(folder, kind, shape, dtype, seed):
    weight = make_weight(kind, shape, seed, dtype)
    factors = svd_factors(weight, folder)
    u, s, vh = (x.double() for x in (factors.u, factors.s, factors.vh))
    r = min(shape)
    assert {x.dtype for x in (factors.u, factors.s, factors.vh)} == {torch.float32}
    assert (u.shape, s.shape, vh.shape) == ((shape[0], r), (r,), (r, shape[1]))
    assert factors.weight_hash == hash_weight(weight)
    # Orthonormal even where singular values vanish: delta_s can steer such a direction too.
    torch.testing.assert_close(u.T @ u, torch.eye(r).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(vh @ vh.T, torch.eye(r).double(), rtol=0, atol=1e-6)
    assert (s >= 0).all()
    assert (s[:-1] >= s[1:]).all()
    rebuilt = torch.zeros(shape, dtype=torch.float64)
    for i in range(r):
        rebuilt += s[i] * torch.outer(u[:, i], vh[i])
    torch.testing.assert_close(rebuilt, weight.double(), rtol=0, atol=1e-6 * max(1.0, s[0].item()))


def test_factors_are_computed_in_float64(tmp_path):
    # A float32 SVD gets a singular value of 1e-7 beside one of 1 wrong in its first digit.
    generator = torch.Generator().manual_seed(3)
    q, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    p, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    weight = (q * torch.tensor([1, 1, 1, 1, 1e-7, 1e-7], dtype=torch.float64)) @ p
    weight = weight.float()  # with rounding errors of its own, about 1e-8: it is this weight that is decomposed
    exact = torch.linalg.svdvals(weight.double())
    assert exact[-1] < 3e-7
    torch.testing.assert_close(svd_factors(weight, tmp_path).s.double(), exact, rtol=2e-7, atol=0)


def with_ratio(shape, ratio, seed):
    """A float64 matrix whose singular values go from 1 down to `ratio` in even steps of their logarithm."""
    u, _, vh = torch.linalg.svd(make_weight("full", shape, seed, torch.float64), full_matrices=False)
    return (u * torch.logspace(0, math.log10(ratio), min(shape), dtype=torch.float64)) @ vh


@few
@given(shape=st.tuples(st.integers(2, 40), st.integers(2, 40)), seed=st.integers(0, 99), ratio=st.floats(0.011, 0.9))
def test_every_route_gives_the_same_adapter(shape, seed, ratio):
    weight = with_ratio(shape, ratio, seed)
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(min(shape), generator=generator, dtype=torch.float64)
    routes = {route: decompose(weight, route) for route in ("svd", "gram", "auto")}
    elongated = min(shape) <= GRAM_MAX_ASPECT * max(shape)
    same = zip(routes["gram" if elongated else "svd"], routes["auto"], strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    u, s, vh = routes["svd"]
    for name in ("gram", "auto"):
        u_, s_, vh_ = routes[name]
        torch.testing.assert_close(s_, s, rtol=0, atol=1e-11)
        torch.testing.assert_close((u_ * s_) @ vh_, weight, rtol=0, atol=1e-11)
        torch.testing.assert_close(u_.T @ u_, torch.eye(len(s), dtype=torch.float64), rtol=0, atol=1e-9)
        torch.testing.assert_close(vh_ @ vh_.T, torch.eye(len(s), dtype=torch.float64), rtol=0, atol=1e-9)
        gap = (s[:-1] - s[1:]).min() if len(s) > 1 else 1.0
        torch.testing.assert_close((u_ * delta) @ vh_, (u * delta) @ vh, rtol=0, atol=1e-10 / gap.item())
        ours, theirs = probe_factors(u_, vh_), probe_factors(u, vh)
        assert (ours - theirs).norm() <= PROBE_TOLERANCE * theirs.norm()


@pytest.mark.parametrize("kind", ["zero", "rank_deficient", "one_hot", "small"])
def test_the_gram_route_is_left_where_it_would_lose_the_small_singular_values(monkeypatch, kind):
    weight = with_ratio((9, 4), 0.005, 1) if kind == "small" else make_weight(kind, (9, 4), dtype=torch.float64)
    wanted, seen, original = decompose(weight, "svd"), [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: seen.append(a) or original(*a, **k))
    assert all(torch.equal(a, b) for a, b in zip(decompose(weight), wanted, strict=True))
    assert len(seen) == 1


def test_many_weights_at_once_are_the_same_bits_as_one_by_one_whatever_the_threads(tmp_path):
    weights = {f"w{i}": make_weight("full", (40 + i, 30), i) for i in range(6)} | {"zero": make_weight("zero", (5, 7))}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = {name: svd_factors(weight, tmp_path / "alone") for name, weight in weights.items()}
        torch.set_num_threads(3)
        together = factors_of(weights, tmp_path / "together")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert list(together) == list(weights)
    assert all(same_bits(together[name], alone[name]) for name in weights)
    assert factors_of({}) == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_with_nan_or_infinity_is_refused_and_nothing_is_written(tmp_path, bad, dtype):
    weight = make_weight("full", (3, 4), dtype=dtype)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        svd_factors(weight, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), ()])
def test_only_a_matrix_has_factors(tmp_path, shape):
    with pytest.raises(ValueError, match="matrix"):
        svd_factors(torch.ones(shape), tmp_path)


# --- the content hash ------------------------------------------------------------------------------------------------


def test_hash_is_of_the_weights_content():
    weight = make_weight("full", (3, 4))
    assert hash_weight(weight) == hash_weight(weight.clone()) == hash_weight(torch.nn.Parameter(weight.clone()))
    assert hash_weight(weight.T) == hash_weight(weight.T.contiguous())  # values, not memory layout
    others = [weight.reshape(4, 3), weight.T, weight.flip(0)]
    for position in range(weight.numel()):
        nudged = weight.clone()
        nudged.view(-1)[position] = torch.nextafter(nudged.view(-1)[position], torch.tensor(math.inf))
        others.append(nudged)
    hashes = {hash_weight(other) for other in others}
    assert len(hashes) == len(others)
    assert hash_weight(weight) not in hashes
    assert len(hash_weight(weight)) == 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_weight_and_its_float32_upcast_are_one_weight(tmp_path, no_svd, dtype):
    half = make_weight("full", (5, 4), dtype=dtype)
    first = svd_factors(half, tmp_path)
    no_svd()
    assert same_bits(first, svd_factors(half.float(), tmp_path))
    assert len(list(tmp_path.iterdir())) == 1


# --- the disk cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_hit_equals_a_miss_bit_for_bit(tmp_path, no_svd, kind):
    weight = make_weight(kind, (6, 4))
    miss = svd_factors(weight, tmp_path / "a")
    other_miss = svd_factors(weight, tmp_path / "b")
    no_svd()
    hit = svd_factors(weight, tmp_path / "a")
    assert same_bits(miss, hit)
    assert same_bits(miss, other_miss)
    # A product rounds by the alignment of its factors in memory, and cold and warm runs must agree in it too.
    assert all(x.data_ptr() % 64 == 0 for x in (hit.u, hit.s, hit.vh))


def test_default_cache_is_under_the_packages_cache(tmp_path, monkeypatch, no_svd):
    monkeypatch.setenv("PROJECTED_GRPO_CACHE", str(tmp_path))
    weight = make_weight("full", (3, 3))
    miss = svd_factors(weight)
    (entry,) = (tmp_path / "svd").iterdir()
    assert hash_weight(weight).hex() in entry.name
    no_svd()
    assert same_bits(miss, svd_factors(weight))


def _flip_middle(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)


def _rewrite(path, change):
    """An entry that is a sound safetensors file with the metadata it had, but other tensors."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: x.contiguous() for name, x in change(tensors).items()}, path, metadata=metadata)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "truncated to the header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\x00\xff" * 300),
    "appended to": lambda path: path.write_bytes(path.read_bytes() + b"\x00" * 4),
    "a flipped bit": _flip_middle,
    "another sign": lambda path: _rewrite(path, lambda t: t | {"u": -t["u"]}),
    "a missing tensor": lambda path: _rewrite(path, lambda t: {"u": t["u"], "vh": t["vh"]}),
    "no checksum": lambda path: save_file(load_file(path), path),
    "NaN": lambda path: _rewrite(path, lambda t: t | {"s": t["s"] * math.nan}),
    "wrong shape": lambda path: _rewrite(path, lambda t: t | {"u": t["u"][:-1]}),
    "transposed": lambda path: _rewrite(path, lambda t: {"u": t["vh"].T, "s": t["s"], "vh": t["u"].T}),
    "another dtype": lambda path: _rewrite(path, lambda t: {n: x.view(torch.int32) for n, x in t.items()}),
    "half precision": lambda path: _rewrite(path, lambda t: {n: x.bfloat16() for n, x in t.items()}),
}
# Shapes that are wrong although the checksum is right: a program of another version may have written them.
FOREIGN = {
    "wrong outer shape": lambda t: t | {"u": t["u"][:-1]},
    "wrong rank": lambda t: {"u": t["u"][:, :2], "s": t["s"][:2], "vh": t["vh"][:2]},
    "inner shapes that do not meet": lambda t: t | {"vh": t["vh"][:2]},
    "a vector": lambda t: t | {"vh": t["vh"][0]},
}


def _assert_recomputed(weight, folder, warnings_logged, no_svd, before):
    again = svd_factors(weight, folder)
    assert same_bits(before, again)
    assert again.u.dtype == torch.float32
    assert len(warnings_logged) == 1
    assert "again" in warnings_logged[0]
    no_svd()  # and the entry is sound from now on
    assert same_bits(before, svd_factors(weight, folder))
    assert len(warnings_logged) == 1
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_recomputed_with_a_warning_never_trusted(tmp_path, warnings_logged, no_svd, damage):
    weight = make_weight("full", (5, 4))
    before = svd_factors(weight, tmp_path)
    (entry,) = tmp_path.iterdir()
    DAMAGE[damage](entry)
    _assert_recomputed(weight, tmp_path, warnings_logged, no_svd, before)


@pytest.mark.parametrize("change", FOREIGN)
def test_an_entry_of_the_wrong_shape_is_recomputed_even_with_a_sound_checksum(
    tmp_path, warnings_logged, no_svd, change
):
    weight = make_weight("full", (5, 4))
    before = svd_factors(weight, tmp_path)
    (entry,) = tmp_path.iterdir()
    tensors = {name: x.contiguous() for name, x in FOREIGN[change](load_file(entry)).items()}
    svd._write_entry(entry, svd.Factors(**tensors, weight_hash=before.weight_hash))
    _assert_recomputed(weight, tmp_path, warnings_logged, no_svd, before)


def test_the_entry_of_another_weight_is_never_trusted(tmp_path, warnings_logged, no_svd):
    # Two weights of one shape, and the file of the one under the name of the other.
    weight, other = make_weight("full", (5, 4)), make_weight("full", (5, 4), seed=1)
    before = svd_factors(weight, tmp_path / "a")
    svd_factors(other, tmp_path / "b")
    (entry,), (foreign,) = (tmp_path / "a").iterdir(), (tmp_path / "b").iterdir()
    shutil.copy(foreign, entry)
    _assert_recomputed(weight, tmp_path / "a", warnings_logged, no_svd, before)


def test_no_byte_of_an_entry_can_be_flipped_unnoticed(tmp_path, warnings_logged):
    weight = make_weight("full", (2, 3))
    before = svd_factors(weight, tmp_path)
    (entry,) = tmp_path.iterdir()
    sound = entry.read_bytes()
    wrong = []
    for position in range(len(sound)):
        for mask in (0x0F, 0xFF):  # 0x0F makes dtype F32 of the header an I32 of the same size
            raw = bytearray(sound)
            raw[position] ^= mask
            entry.write_bytes(raw)
            after = svd_factors(weight, tmp_path)
            if not same_bits(before, after) or after.u.dtype != torch.float32:
                wrong.append((position, mask, bytes(raw[max(0, position - 8) : position + 8])))
    assert wrong == []
    assert len(warnings_logged) > len(sound)  # most flips were seen as damage; a blank of the padding need not be


@pytest.mark.parametrize("through", ["argument", "environment"])
def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch, warnings_logged, through):
    (tmp_path / "file").write_text("not a folder")
    blocked = tmp_path / "file" / "cache"  # below a file: not even root can make it
    weight = make_weight("degenerate", (4, 4))
    if through == "environment":
        monkeypatch.setenv("PROJECTED_GRPO_CACHE", str(blocked))
    factors = [svd_factors(weight, blocked if through == "argument" else None) for _ in range(2)]
    assert same_bits(factors[0], svd_factors(weight, tmp_path / "sound"))
    assert same_bits(factors[0], factors[1])
    assert len(warnings_logged) == 2
    assert "cannot be written" in warnings_logged[0]
    assert (tmp_path / "file").read_text() == "not a folder"


def test_an_entry_that_cannot_be_put_in_place_leaves_no_litter(tmp_path, warnings_logged):
    weight = make_weight("full", (4, 4))
    before = svd_factors(weight, tmp_path / "a")
    (name,) = os.listdir(tmp_path / "a")
    (tmp_path / "b" / name / "occupied").mkdir(parents=True)  # a folder where the entry should be
    assert same_bits(before, svd_factors(weight, tmp_path / "b"))
    assert "cannot be written" in warnings_logged[0]
    assert os.listdir(tmp_path / "b") == [name]


# --- the probe and the fingerprint -----------------------------------------------------------------------------------


@few
@given(shape=shapes, seed=st.integers(0, 99))
def test_probe_is_sixteen_seeded_readings_of_u_diag_xi_vh_eta(folder, shape, seed):
    factors = svd_factors(make_weight("full", shape, seed), folder)
    r = min(shape)
    generator = torch.Generator().manual_seed(svd._PROBE_SEED)
    xi, eta = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (r, shape[1]))
    zeta = torch.randn(16, shape[0], generator=generator, dtype=torch.float64)
    slow = [0.0] * 16
    for a in range(shape[0]):
        for i in range(r):
            for b in range(shape[1]):
                term = (factors.u[a, i].double() * xi[i] * factors.vh[i, b].double() * eta[b]).item()
                slow = [total + zeta[n, a].item() * term for n, total in enumerate(slow)]
    state = torch.get_rng_state()
    assert probe_factors(factors.u, factors.vh).tolist() == pytest.approx(slow, rel=1e-10, abs=1e-11)
    assert torch.equal(torch.get_rng_state(), state)


def _fingerprint(u, vh, weight_hash=b"h" * 32):
    return pack_fingerprint(weight_hash, probe_factors(u, vh))


@few
@given(shape=shapes, seed=st.integers(0, 99), which=st.integers(0, 8))
def test_a_flipped_singular_pair_is_the_same_decomposition_and_a_flipped_vector_is_not(folder, shape, seed, which):
    factors = svd_factors(make_weight("full", shape, seed), folder)
    i = which % min(shape)
    u, vh = factors.u.clone(), factors.vh.clone()
    u[:, i] *= -1
    assert fingerprint_mismatch(_fingerprint(factors.u, factors.vh), _fingerprint(u, vh)) is not None
    vh[i] *= -1  # U diag(δ) Vh is what it was, so δ means what it meant
    assert fingerprint_mismatch(_fingerprint(factors.u, factors.vh), _fingerprint(u, vh)) is None


@few
@given(shape=shapes.filter(lambda s: min(s) > 1), seed=st.integers(0, 99), angle=st.floats(0.01, 1.5))
def test_a_rotation_inside_a_degenerate_subspace_is_another_decomposition(folder, shape, seed, angle):
    weight = make_weight("degenerate", shape, seed)
    factors = svd_factors(weight, folder)
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    u, vh = factors.u.double(), factors.vh.double()
    u[:, :2], vh[:2] = u[:, :2] @ turn, turn.T @ vh[:2]
    rebuilt = (u * factors.s.double()) @ vh
    torch.testing.assert_close(rebuilt, weight.double(), rtol=0, atol=1e-6)  # as correct as the first
    why = fingerprint_mismatch(_fingerprint(factors.u, factors.vh), _fingerprint(u.float(), vh.float()))
    assert why is not None
    assert "factors differ" in why


def test_a_small_rotation_of_any_pair_is_noticed_in_a_wide_layer():
    generator = torch.Generator().manual_seed(0)
    u, vh = (torch.linalg.qr(torch.randn(512, 512, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    here, angle = _fingerprint(u, vh), 1e-3
    for i, j in torch.randint(0, 512, (40, 2), generator=generator).tolist():
        if i == j:
            continue
        turned_u, turned_vh = u.clone(), vh.clone()
        c, s = math.cos(angle), math.sin(angle)
        turned_u[:, i], turned_u[:, j] = c * u[:, i] + s * u[:, j], c * u[:, j] - s * u[:, i]
        turned_vh[i], turned_vh[j] = c * vh[i] + s * vh[j], c * vh[j] - s * vh[i]
        assert fingerprint_mismatch(_fingerprint(turned_u, turned_vh), here) is not None


def test_rounding_of_the_last_place_is_no_other_decomposition(folder):
    factors = svd_factors(make_weight("full", (64, 48)), folder)
    generator = torch.Generator().manual_seed(0)
    u, vh = (x * (1 + 1e-7 * torch.randn(x.shape, generator=generator)) for x in (factors.u, factors.vh))
    assert not torch.equal(u, factors.u)
    assert fingerprint_mismatch(_fingerprint(factors.u, factors.vh), _fingerprint(u, vh)) is None


@few
@given(
    digest=st.binary(min_size=32, max_size=32),
    probe=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=16, max_size=16),
)
def test_fingerprint_round_trip_survives_every_cast_of_a_model(digest, probe):
    probe = torch.tensor(probe, dtype=torch.float64)
    packed = pack_fingerprint(digest, probe)
    assert packed.shape == (FINGERPRINT_BYTES,)
    assert packed.dtype == torch.uint8
    model = torch.nn.Module()
    model.register_buffer("fingerprint", packed)
    unpacked, numbers = unpack_fingerprint(model.half().bfloat16().double().fingerprint)
    assert unpacked == digest
    assert torch.equal(numbers, probe)


def test_mismatch_names_what_differs():
    probe = torch.full((16,), 0.25, dtype=torch.float64)
    here = pack_fingerprint(b"a" * 32, probe)
    assert "weight differs" in fingerprint_mismatch(pack_fingerprint(b"b" * 32, probe), here)
    far, near = probe * (1 + 2 * PROBE_TOLERANCE), probe * (1 + PROBE_TOLERANCE / 2)
    assert "factors differ" in fingerprint_mismatch(pack_fingerprint(b"a" * 32, far), here)
    assert fingerprint_mismatch(pack_fingerprint(b"a" * 32, near), here) is None
    assert PROBE_TOLERANCE == 1e-6
    assert "shape (40,)" in fingerprint_mismatch(here[:40], here)


@pytest.mark.parametrize("probe", [math.nan, math.inf, -math.inf])
def test_a_probe_that_is_no_number_fits_nothing(probe):
    bad, good = torch.full((16,), probe), torch.full((16,), 0.25)
    assert fingerprint_mismatch(pack_fingerprint(b"a" * 32, bad), pack_fingerprint(b"a" * 32, good)) is not None
