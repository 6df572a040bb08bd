"""METHOD 3 and 7: the SVD basis, its orientation, the one noise floor, its file, its refusals, the refresh overlap."""

import json
import math
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file

from projected_grpo import basis as module_under_test
from projected_grpo.adapter import DeltaSConfig, delta_s_modules
from projected_grpo.basis import BasisInfo, HackBasis, Overlap, check_top_k, orient
from projected_grpo.controls import random_basis
from projected_grpo.errors import InputError
from projected_grpo.models import load_model, model_fingerprint
from projected_grpo.pairs import ContrastivePair, PairSet
from projected_grpo.svd import pack_fingerprint, unpack_fingerprint
from projected_grpo.version import __version__, code_version

INFO = BasisInfo(
    pair_set="hacks", pair_set_sha256="ab" * 32, n_pairs=6, model="m", model_fingerprint="0123456789abcdef"
)


def gaussian(n: int, r: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(n, r, generator=torch.Generator().manual_seed(seed))


def make(grads: dict[str, torch.Tensor], top_k: int = 3, drop: float = 0.0, like=None, **info) -> HackBasis:
    prints = {name: torch.full((40,), i, dtype=torch.uint8) for i, name in enumerate(grads)}
    n = len(next(iter(grads.values())))
    return HackBasis.from_pair_gradients(grads, prints, replace(INFO, n_pairs=n, **info), top_k, drop, like)


def with_rows(**modules: torch.Tensor) -> HackBasis:
    """A basis that holds just these rows."""
    directions = {name.replace("_", "."): rows for name, rows in modules.items()}
    n = {name: len(rows) for name, rows in directions.items()}
    return HackBasis(
        directions,
        {name: torch.ones(k) for name, k in n.items()},
        {name: torch.ones(2, k) for name, k in n.items()},
        {name: torch.ones(2) for name in n},
        {name: torch.zeros(40, dtype=torch.uint8) for name in n},
    )


def equal(a: HackBasis, b: HackBasis) -> bool:
    """Every tensor to the bit and in its dtype, every mapping in its order, the info to the last field."""
    for field in fields(HackBasis):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name == "info":
            if x != y:
                return False
        elif list(x) != list(y) or any(x[n].dtype != y[n].dtype or not torch.equal(x[n], y[n]) for n in x):
            return False
    return True


# --- slow: eigenvectors of DᵀD, and Python loops ---------------------------------------------------------------------


def slow_axes(d: torch.Tensor, top_k: int) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """(singular value, oriented row, coefficients) of the top k axes, strongest first."""
    d = d.double().numpy()
    values, vectors = np.linalg.eigh(d.T @ d)
    axes = []
    for j in list(reversed(range(len(values))))[: min(top_k, *d.shape)]:
        row = vectors[:, j]
        coefficients = [sum(d[i, c] * row[c] for c in range(d.shape[1])) for i in range(d.shape[0])]
        positive, negative = sum(c > 0 for c in coefficients), sum(c < 0 for c in coefficients)
        backward = negative > positive or (negative == positive and sum(coefficients) < 0)
        sign = -1.0 if backward else 1.0
        axes.append((math.sqrt(max(values[j], 0.0)), sign * row, sign * np.array(coefficients)))
    return axes


def slow_quantile(values: list[float], q: float) -> float:
    """Linear between the two order statistics around q (n - 1)."""
    ordered = sorted(values)
    below = math.floor(q * (len(ordered) - 1))
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (q * (len(ordered) - 1) - below) * (ordered[above] - ordered[below])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.tuples(st.integers(2, 9), st.integers(-2, 2)), min_size=1, max_size=4),
    n=st.integers(3, 8),
    top_k=st.integers(1, 8),
    drop=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]),
    seed=st.integers(0, 10**6),
)
def test_the_basis_is_the_top_right_singular_vectors_above_one_floor_oriented_by_most_pairs(
    shapes, n, top_k, drop, seed
):
    assume(top_k <= n)
    grads = {f"m{i}": gaussian(n, r, seed + i, 10.0**scale) for i, (r, scale) in enumerate(shapes)}
    basis = make(grads, top_k, drop)
    axes = {name: slow_axes(d, top_k) for name, d in grads.items()}
    floor = slow_quantile([s for of_module in axes.values() for s, _, _ in of_module], drop)
    assert basis.info.floor == pytest.approx(floor, rel=1e-6, abs=1e-6)
    assert (basis.info.top_k, basis.info.drop_bottom_frac) == (top_k, drop)
    for name, of_module in axes.items():
        surely = sum(s > floor * (1 + 1e-6) + 1e-6 for s, _, _ in of_module)
        at_most = sum(s >= floor * (1 - 1e-6) - 1e-6 for s, _, _ in of_module)
        v = basis.directions.get(name, torch.empty(0, grads[name].shape[1]))
        assert surely <= len(v) <= at_most
        assert v.dtype == torch.float32
        torch.testing.assert_close(v @ v.T, torch.eye(len(v)), rtol=0, atol=1e-5)
        spectrum = torch.linalg.svdvals(grads[name].double())
        torch.testing.assert_close(basis.spectrum[name].double(), spectrum, rtol=1e-5, atol=1e-6)
        for j, (s, row, coefficients) in enumerate(of_module[: len(v)]):
            assert basis.singular_values[name][j].item() == pytest.approx(s, rel=1e-4)
            gap = min([abs(s - other) for other, _, _ in of_module if other != s] + [s - 0.0]) / s
            if gap < 1e-2 or np.abs(coefficients).min() < 1e-3 * s:
                continue  # two axes as strong as each other, or a vote within rounding: no direction to compare
            np.testing.assert_allclose(v[j], row, atol=1e-3)
            np.testing.assert_allclose(basis.coefficients[name][:, j], coefficients, atol=1e-3 * s)
    assert basis.n_axes == sum(len(v) for v in basis.directions.values())


def test_the_floor_is_over_all_modules_so_a_weak_module_is_left_without_an_axis():
    grads = {f"strong{i}": gaussian(6, 5, i) for i in range(3)} | {"weak": gaussian(6, 5, 9, scale=1e-3)}
    basis = make(grads, top_k=2, drop=0.25)
    assert list(basis.directions) == ["strong0", "strong1", "strong2"]
    assert all(len(v) == 2 for v in basis.directions.values())
    for part in (basis.singular_values, basis.coefficients, basis.fingerprints):
        assert list(part) == list(basis.directions)
    assert list(basis.spectrum) == list(grads)  # of every module, so that what was dropped can be judged


def test_the_floor_pools_only_the_values_that_the_top_k_keeps():
    d = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))
    basis = make({"a": d, "b": 10 * d}, top_k=2, drop=0.5)
    assert basis.info.floor == pytest.approx(slow_quantile([8, 4, 80, 40], 0.5))
    assert {name: s.tolist() for name, s in basis.singular_values.items()} == {"b": [80.0, 40.0]}


def test_an_axis_exactly_at_the_floor_is_kept():
    basis = make({"a": torch.diag(torch.tensor([5.0, 3.0, 2.0]))}, top_k=3, drop=0.5)
    assert basis.info.floor == 3.0
    assert basis.singular_values["a"].tolist() == [5.0, 3.0]


def test_without_a_floor_every_top_axis_of_every_module_is_kept():
    basis = make({"a": gaussian(6, 5, 0), "b": gaussian(6, 4, 1, scale=1e-6)}, top_k=3, drop=0.0)
    assert {name: len(v) for name, v in basis.directions.items()} == {"a": 3, "b": 3}


def test_k_above_r_keeps_r_axes():
    basis = make({"a": gaussian(6, 2, 0), "b": gaussian(6, 8, 1)}, top_k=5, drop=0.0)
    assert {name: tuple(v.shape) for name, v in basis.directions.items()} == {"a": (2, 2), "b": (5, 8)}


def test_a_module_without_any_gradient_gets_no_direction_even_without_a_floor():
    basis = make({"a": gaussian(6, 5, 0), "dead": torch.zeros(6, 5)}, top_k=2, drop=0.0)
    assert list(basis.directions) == ["a"]
    assert basis.spectrum["dead"].tolist() == [0.0] * 5


def test_rounding_noise_beyond_the_rank_of_d_is_no_direction():
    """Five times the same pair is one direction; what else the SVD returns is arbitrary."""
    d = gaussian(1, 7, 3).repeat(5, 1)
    assert {name: len(v) for name, v in make({"a": d}, top_k=3, drop=0.0).directions.items()} == {"a": 1}


def test_pairs_without_any_gradient_are_refused():
    with pytest.raises(InputError, match="no gradient") as refused:
        make({"a": torch.zeros(4, 3), "b": torch.zeros(4, 5)})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("top_k", [0, -1, 5, 10])
def test_k_that_the_pairs_cannot_fill_is_refused(top_k):
    with pytest.raises(InputError, match=f"--v-hack-k {top_k} .* 4 pairs"):
        check_top_k(top_k, 4)
    for allowed in (1, 4):
        check_top_k(allowed, 4)


@pytest.mark.parametrize(
    ("coefficients", "sign"),
    [
        ([1.0, 1.0, -9.0], 1.0),  # most pairs, not the mean
        ([-1.0, -1.0, 9.0], -1.0),
        ([3.0, -1.0], 1.0),  # a tie goes by the sign of the mean
        ([1.0, -3.0], -1.0),
        ([0.0, 0.0, 2.0, -1.0, -1.0], -1.0),  # a pair without a say does not vote
        ([0.0, 4.0, -1.0], 1.0),
        ([2.0, -2.0], 1.0),
        ([0.0, 0.0], 1.0),
    ],
)
def test_a_row_points_where_most_pairs_have_a_positive_coefficient(coefficients, sign):
    column, row = torch.tensor(coefficients)[:, None], torch.tensor([[0.6, 0.8]])
    undecided = sum(coefficients) == 0  # tied in votes and in the mean: the row stays as it is
    for flip in (1.0,) if undecided else (1.0, -1.0):
        turned, turned_coefficients = orient(flip * row, flip * column)
        assert torch.equal(turned, sign * row)
        assert torch.equal(turned_coefficients, sign * column)


def test_a_hackward_gradient_has_a_positive_coefficient_on_the_row():
    """The orientation through the whole construction: five pairs of six pull along +x, one far along -x."""
    d = torch.tensor([[1.0, 0.0]] * 5 + [[-20.0, 0.0]])
    v = make({"a": d}, top_k=1).directions["a"]
    torch.testing.assert_close(v, torch.tensor([[1.0, 0.0]]))


def test_coefficients_are_the_pairs_gradients_on_the_rows():
    grads = {"a": gaussian(6, 5, 0), "b": gaussian(6, 9, 1)}
    basis = make(grads, top_k=4)
    for name, v in basis.directions.items():
        torch.testing.assert_close(basis.coefficients[name], grads[name] @ v.T, rtol=1e-5, atol=1e-5)
        votes = basis.coefficients[name].sign().sum(0)
        assert (votes >= 0).all()


# --- taken from a model ----------------------------------------------------------------------------------------------

PAIRS = PairSet(
    "three",
    "cd" * 32,
    tuple(
        ContrastivePair(f"p{i}", "weak_run_tests", f"def f{i}():", f" print({i})", f" assert {i} == {i}", None)
        for i in range(3)
    ),
)


@pytest.fixture(scope="module")
def tiny():
    loaded = load_model("tiny-random", device="cpu")
    return get_peft_model(loaded.model, DeltaSConfig()), loaded.tokenizer


@pytest.fixture(scope="module")
def extracted(tiny):
    model, tokenizer = tiny
    return HackBasis.extract_from_model(
        model, tokenizer, PAIRS, temperature=0.7, top_k=2, token_reduction="mean", model_name="tiny-random"
    )


def test_the_info_says_what_the_basis_was_made_of(tiny, extracted):
    assert asdict(extracted.info) == {
        "kind": "real",
        "pair_set": "three",
        "pair_set_sha256": "cd" * 32,
        "n_pairs": 3,
        "model": "tiny-random",
        "model_fingerprint": model_fingerprint(tiny[0]),
        "top_k": 2,
        "drop_bottom_frac": 0.25,
        "floor": extracted.info.floor,
        "token_reduction": "mean",
        "temperature": 0.7,
        "dtype": "float32",
        "chat_template_kwargs": {},
        "delta_norm": 0.0,
        "seed": None,
        "code_version": code_version(),
    }
    assert __version__ in code_version()
    assert extracted.info.floor > 0
    modules = delta_s_modules(tiny[0])
    assert list(extracted.spectrum) == list(modules)
    assert all(torch.equal(print_, modules[name].fingerprint) for name, print_ in extracted.fingerprints.items())


def test_extraction_refuses_k_above_the_number_of_pairs(tiny):
    with pytest.raises(InputError, match="--v-hack-k 4"):
        HackBasis.extract_from_model(*tiny, PAIRS, temperature=0.7, top_k=4)


# --- a basis belongs to one model ------------------------------------------------------------------------------------


def refusal(basis: HackBasis, model) -> str:
    with pytest.raises(InputError) as refused:
        basis.check_fits(model)
    message = str(refused.value)
    assert "\n" not in message
    assert "does not fit this model at " in message
    return message


def test_a_basis_fits_its_own_model_fresh_and_reloaded(tiny, extracted, tmp_path):
    extracted.check_fits(tiny[0])
    extracted.save(tmp_path / "b.safetensors")
    again = get_peft_model(load_model("tiny-random", device="cpu").model, DeltaSConfig())
    HackBasis.load(tmp_path / "b.safetensors").check_fits(again)


def test_a_basis_over_other_weights_is_refused(extracted):
    other = get_peft_model(load_model("tiny-random", device="cpu", seed=1).model, DeltaSConfig())
    assert "its weight differs" in refusal(extracted, other)


def test_a_basis_over_one_changed_module_is_refused_by_its_name(extracted):
    base = load_model("tiny-random", device="cpu").model
    name = list(extracted.directions)[-1]
    base.get_submodule(name).weight.data[0, 0] += 1e-3
    message = refusal(extracted, get_peft_model(base, DeltaSConfig()))
    assert f"at {name}: its weight differs" in message


def test_a_basis_over_modules_that_the_model_does_not_adapt_is_refused(extracted):
    narrow = get_peft_model(load_model("tiny-random", device="cpu").model, DeltaSConfig(target_modules=["q_proj"]))
    assert "does not adapt that module" in refusal(extracted, narrow)


def test_a_basis_of_another_r_is_refused(tiny, extracted):
    name = next(iter(extracted.directions))
    cut = extracted.directions | {name: extracted.directions[name][:, :-1]}
    r = extracted.directions[name].shape[1]
    assert f"r is {r - 1} in the basis and {r} in the model" in refusal(replace(extracted, directions=cut), tiny[0])


@pytest.mark.parametrize(("shift", "fits"), [(1e-9, True), (1e-4, False), (-1e-4, False)])
def test_a_basis_over_other_factors_of_the_same_weights_is_refused(tiny, extracted, shift, fits):
    name = next(iter(extracted.directions))
    weight_hash, probe = unpack_fingerprint(extracted.fingerprints[name])
    prints = extracted.fingerprints | {name: pack_fingerprint(weight_hash, probe + shift)}
    moved = replace(extracted, fingerprints=prints)
    if fits:
        moved.check_fits(tiny[0])
    else:
        assert "its SVD factors differ" in refusal(moved, tiny[0])


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", [0.0, 0.25])
def test_a_saved_basis_loads_to_the_last_bit_with_everything_about_it(tmp_path, drop):
    grads = {"b.weak": gaussian(6, 5, 2, 1e-3), "a.x": gaussian(6, 5, 0), "c": gaussian(6, 9, 1)}
    basis = make(grads, 3, drop, temperature=0.1 + 0.2, token_reduction="mean", dtype="bfloat16", seed=7)
    path = tmp_path / "new folder" / "basis.safetensors"
    basis.save(path)
    assert equal(HackBasis.load(path), basis)
    assert equal(HackBasis.load(str(path)), basis)
    for made in (basis, random_basis(basis, 0), HackBasis.load(path)):  # one layout, so that products round alike
        assert all(v.is_contiguous() for v in made.directions.values())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_save_replaces_a_file_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "basis.safetensors"
    old, new = make({"a": gaussian(6, 5, 0)}), make({"a": gaussian(6, 5, 1)})
    old.save(path)

    def full_disk(tensors, filename, metadata=None):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module_under_test, "save_file", full_disk)
        with pytest.raises(OSError, match="no space"):
            new.save(path)
    assert equal(HackBasis.load(path), old)
    new.save(path)
    assert equal(HackBasis.load(path), new)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def one_line(path) -> str:
    with pytest.raises(InputError) as refused:
        HackBasis.load(path)
    message = str(refused.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_a_missing_basis_file_is_refused(tmp_path):
    assert "does not exist" in one_line(tmp_path / "none.safetensors")
    assert "does not exist" in one_line(tmp_path)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_is_refused_as_damaged(tmp_path_factory, share):
    path = tmp_path_factory.mktemp("cut") / "b.safetensors"
    make({"a": gaussian(4, 5, 0)}, top_k=2).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert "damaged" in one_line(path)


def test_what_is_no_basis_file_is_refused(tmp_path):
    text, other = tmp_path / "b.toml", tmp_path / "adapter.safetensors"
    text.write_text("[[pair]]\nid = 'x'\n")
    assert "damaged or no basis file" in one_line(text)
    save_file({"x": torch.zeros(2)}, other)
    assert "damaged or no basis file" in one_line(other)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "0"}, "format '0'"),
        ({"format": "1"}, "format '1'"),
        ({"modules": None}, "modules"),
        ({"info": None}, "info"),
        ({"modules": 7}, "damaged"),
        ({"modules": ["a", "elsewhere"]}, "elsewhere"),
        ({"all_modules": ["elsewhere"]}, "elsewhere"),
        ({"info": {"flavour": 1}}, "flavour"),
        ({"info": [1]}, "damaged"),
        ({"checksum": "0"}, "checksum"),
    ],
)
def test_a_basis_file_with_wrong_metadata_is_refused(tmp_path, change, says):
    path = tmp_path / "b.safetensors"
    make({"a": gaussian(4, 5, 0)}, top_k=2).save(path)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["basis"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    about = {key: value for key, value in {**about, **change}.items() if value is not None}
    save_file(tensors, path, metadata={"basis": json.dumps(about)})
    assert says in one_line(path)


def test_a_flipped_bit_in_the_tensors_is_refused_and_equal_bases_are_equal_files(tmp_path):
    path, again = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    basis = make({"a": gaussian(4, 5, 0), "b": gaussian(4, 6, 1)}, top_k=2)
    basis.save(path)
    basis.save(again)
    raw = bytearray(path.read_bytes())
    assert raw == again.read_bytes()
    raw[-3] ^= 1
    path.write_bytes(raw)
    assert "checksum" in one_line(path)


def test_the_info_is_readable_without_this_package(tmp_path):
    path = tmp_path / "b.safetensors"
    make({"a": gaussian(4, 5, 0)}, top_k=2).save(path)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["basis"])["info"]["pair_set"] == "hacks"


# --- overlap with the basis that a refresh replaces ------------------------------------------------------------------


def rows(r: int, *indices: int) -> torch.Tensor:
    return torch.eye(r)[list(indices)]


def haar(k: int, r: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(r, k, generator=generator, dtype=torch.float64))[0].T.float()


def slow_overlap(new: HackBasis, old: HackBasis) -> tuple[float, float]:
    shares, nulls = [], []
    for name, v in new.directions.items():
        if name not in old.directions:
            continue
        w = old.directions[name]
        total = sum(float(np.dot(x.double().numpy(), y.double().numpy())) ** 2 for x in v for y in w)
        shares.append(total / min(len(v), len(w)))
        nulls.append(max(len(v), len(w)) / v.shape[1])
    return sum(shares) / len(shares), sum(nulls) / len(nulls)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(4, 9)), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
)
def test_overlap_and_its_null_follow_their_formulas(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    new = with_rows(**{f"m{i}": haar(k, r, generator) for i, (k, _, r) in enumerate(shapes)}, came=rows(4, 0))
    old = with_rows(
        went=rows(4, 0), gone=rows(4, 1), **{f"m{i}": haar(k, r, generator) for i, (_, k, r) in enumerate(shapes)}
    )
    overlap = new.overlap(old)
    assert (overlap.mean, overlap.null) == pytest.approx(slow_overlap(new, old), rel=1e-6)
    assert (overlap.n_came, overlap.n_went) == (1, 2)
    assert 0 <= overlap.mean <= 1 + 1e-6
    back = old.overlap(new)
    assert (back.mean, back.null) == pytest.approx((overlap.mean, overlap.null), rel=1e-6)
    assert (back.n_came, back.n_went) == (2, 1)


def test_overlap_of_equal_spans_is_one_of_orthogonal_spans_zero_and_of_none_null():
    basis = with_rows(a=rows(6, 0, 1), b=rows(6, 2, 3, 4))
    assert basis.overlap(basis) == Overlap(mean=1.0, null=(2 / 6 + 3 / 6) / 2, n_came=0, n_went=0)
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    turned = with_rows(a=turn @ rows(6, 0, 1), b=-rows(6, 4, 2, 3))
    assert turned.overlap(basis).mean == pytest.approx(1.0, rel=1e-6)  # the span, not the rows
    assert with_rows(a=rows(6, 2, 3), b=rows(6, 0, 1)).overlap(basis).mean == 0.0
    # A smaller basis inside a larger one is kept whole.
    assert with_rows(b=rows(6, 3)).overlap(basis) == Overlap(mean=1.0, null=0.5, n_came=0, n_went=1)
    assert with_rows(c=rows(6, 0)).overlap(basis) == Overlap(mean=None, null=None, n_came=1, n_went=2)


def test_the_overlap_null_is_what_random_subspaces_give():
    new, old = with_rows(a=rows(12, 0, 1), b=rows(8, 0)), with_rows(a=rows(12, *range(5)), b=rows(8, 0, 1))
    draws = [random_basis(new, seed).overlap(random_basis(old, seed + 10_000)) for seed in range(300)]
    means = np.array([draw.mean for draw in draws])
    assert {draw.null for draw in draws} == {(5 / 12 + 2 / 8) / 2}
    assert abs(means.mean() - draws[0].null) < 4 * means.std() / math.sqrt(len(means))
