"""Thin SVD of a frozen weight, W = U diag(S) Vh, computed once and kept on disk.

`delta_s` and every basis over it mean something only in the coordinates of one decomposition. A second, equally
correct decomposition of the same weight may flip the sign of a singular vector or rotate a degenerate pair of them,
so the factors are computed in float64, rounded to float32, stored under a hash of the weight's values, and identified
by a fingerprint (hash of W, probe of the factors) that adapters and bases carry with them.

Left out on purpose: a truncated decomposition. The knob acts on the whole spectrum, as in AntiPaSTO.
"""

import hashlib
import os
import struct
import threading
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Float64, UInt8
from loguru import logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from projected_grpo.paths import cache_dir

CACHE_FORMAT = "2"
PROBE_SIZE = 16
FINGERPRINT_BYTES = 32 + 8 * PROBE_SIZE  # sha256 of the weight, and the probe in float64
PROBE_TOLERANCE = 1e-6
_PROBE_SEED = 20260101
GRAM_RATIO = 1e-2
GRAM_MAX_ASPECT = 0.9  # smaller over larger side
Route = Literal["auto", "svd", "gram"]
_ONE_AT_A_TIME = threading.Lock()  # torch loads CUDA's linear algebra on first use, and only once


@dataclass(frozen=True)
class Factors:
    """U (d_out, r), S (r,), Vh (r, d_in) in float32, r = min(d_out, d_in), and the sha256 of W's values."""

    u: Float[Tensor, "d_out r"]
    s: Float[Tensor, " r"]
    vh: Float[Tensor, "r d_in"]
    weight_hash: bytes


def hash_weight(weight: Float[Tensor, "d_out d_in"]) -> bytes:
    """sha256 over shape and values. Half precision is hashed as its exact float32, so that a bfloat16 weight and the
    same weight upcast to float32 are one weight."""
    wide = weight.detach().to(device="cpu", dtype=torch.promote_types(weight.dtype, torch.float32)).contiguous()
    digest = hashlib.sha256(f"{tuple(wide.shape)} {wide.dtype}".encode())
    digest.update(wide.numpy().data)
    return digest.digest()


def svd_factors(weight: Float[Tensor, "d_out d_in"], cache: Path | None = None) -> Factors:
    """Factors of `weight`, from the cache where an undamaged entry of the same weight is there.

    `cache` is the folder (default: `svd/` under the package's cache). An entry that cannot be read or whose checksum
    does not match is recomputed, with a warning; a cache that cannot be written only costs the time to recompute.

    Raises:
        ValueError: the weight is no matrix, or holds NaN or infinity.
    """
    if weight.ndim != 2:
        raise ValueError(f"an SVD needs a matrix, got a weight of shape {tuple(weight.shape)}")
    folder = cache_dir("svd") if cache is None else cache
    weight_hash = hash_weight(weight)
    entry = folder / f"{weight_hash.hex()}.v{CACHE_FORMAT}.safetensors"
    cached = _read_entry(entry, weight_hash, weight.shape)
    if cached is not None:
        return cached
    u, s, vh = (x.float().cpu().contiguous() for x in decompose(weight))
    factors = Factors(u, s, vh, weight_hash)
    _write_entry(entry, factors)
    return factors


def decompose(weight: Float[Tensor, "d_out d_in"], route: Route = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, r), S (r,), Vh (r, d_in) of `weight` in float64, on its device.

    `svd`: `torch.linalg.svd`. `gram`: the eigenvectors of the smaller of W Wᵀ and WᵀW, and the other side from them,
    about twice as fast on a CPU and many times on a GPU; its error grows with the square of the condition number, so
    `auto` keeps it where smallest / largest singular value > GRAM_RATIO and otherwise takes `svd`. A square matrix
    hardly ever passes, and so is not tried on a CPU, where the trial costs half as much again.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity, so it has no SVD")
    with _ONE_AT_A_TIME if weight.is_cuda else nullcontext():
        return _decompose(weight.detach().double(), route)


def _decompose(wide: Float64[Tensor, "d_out d_in"], route: Route) -> tuple[Tensor, Tensor, Tensor]:
    square = min(wide.shape) > GRAM_MAX_ASPECT * max(wide.shape)
    if route == "svd" or (route == "auto" and square and not wide.is_cuda):
        return torch.linalg.svd(wide, full_matrices=False)
    tall = wide if len(wide) >= wide.shape[1] else wide.T
    squares, v = torch.linalg.eigh(tall.T @ tall)
    squares, v = squares.flip(0), v.flip(1)
    if route == "auto" and not squares[-1] > squares[0] * GRAM_RATIO**2:  # also for W = 0
        return torch.linalg.svd(wide, full_matrices=False)
    u = tall @ v
    s = u.norm(dim=0)
    u = u / s
    return (u, s, v.T) if tall is wide else (v, s, u.T)


def factors_of(weights: Mapping[str, Tensor], cache: Path | None = None) -> dict[str, Factors]:
    """`svd_factors` of many weights, several at a time, with a progress bar: one thread each, so that the factors do
    not depend on how many threads there are."""
    if not weights:
        return {}
    threads = torch.get_num_threads()
    on_cpu = all(weight.device.type == "cpu" for weight in weights.values())
    bar = tqdm(total=len(weights), desc="SVD", unit="weight", leave=False, disable=None)

    def one(weight: Tensor) -> Factors:
        factors = svd_factors(weight, cache)
        bar.update()
        return factors

    try:
        if on_cpu:
            torch.set_num_threads(1)
        workers = threads if on_cpu else 4  # a GPU's work is done in turn, while other threads hash, read and write
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool, bar:
            return dict(zip(weights, pool.map(one, weights.values()), strict=True))
    finally:
        torch.set_num_threads(threads)


def probe_factors(u: Float[Tensor, "d_out r"], vh: Float[Tensor, "r d_in"]) -> Float64[Tensor, "16"]:
    """Numbers that tell decompositions apart: 16 seeded readings ζᵀ w of w = U diag(ξ) Vh η, in float64.

    ξ, η and the ζ are drawn from one fixed seed. Flipping the sign of a singular pair leaves U diag(ξ) Vh as it is and
    rightly leaves the probe as it is too; a rotation inside a degenerate subspace, which changes what δ means, changes
    it.
    """
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    xi, eta = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (u.shape[1], vh.shape[1]))
    zeta = torch.randn(PROBE_SIZE, u.shape[0], generator=generator, dtype=torch.float64)
    xi, eta, zeta = (x.to(u.device) for x in (xi, eta, zeta))
    return (zeta @ (u.detach().double() @ (xi * (vh.detach().double() @ eta)))).cpu()


def pack_fingerprint(weight_hash: bytes, probe: Float64[Tensor, "16"]) -> UInt8[Tensor, "160"]:
    """Hash and probe as bytes: an integer tensor survives every dtype cast that a model may go through."""
    packed = weight_hash + struct.pack(f"<{PROBE_SIZE}d", *probe.tolist())
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8).clone()


def unpack_fingerprint(fingerprint: UInt8[Tensor, "160"]) -> tuple[bytes, Float64[Tensor, "16"]]:
    """Inverse of `pack_fingerprint`: (sha256 of W, probe)."""
    raw = bytes(fingerprint.cpu().tolist())
    return raw[:32], torch.tensor(struct.unpack(f"<{PROBE_SIZE}d", raw[32:]), dtype=torch.float64)


def fingerprint_mismatch(saved: UInt8[Tensor, "160"], here: UInt8[Tensor, "160"]) -> str | None:
    """Why something saved over one decomposition means nothing over another, or None when they are the same."""
    if saved.shape != here.shape:
        return f"its fingerprint has shape {tuple(saved.shape)}, this version's {tuple(here.shape)}"
    (saved_hash, saved_probe), (hash_here, probe_here) = unpack_fingerprint(saved), unpack_fingerprint(here)
    if saved_hash != hash_here:
        return f"its weight differs (saved over {saved_hash.hex()[:12]}, this model has {hash_here.hex()[:12]})"
    gap, scale = (saved_probe - probe_here).norm().item(), probe_here.norm().item()
    if not gap <= PROBE_TOLERANCE * scale:  # NaN fits nothing
        return f"its SVD factors differ (probes {gap:.3g} apart at a norm of {scale:.3g})"
    return None


def _checksum(factors: Factors) -> str:
    """Over the weight's hash too: the entry of another weight, under this one's name, is damage."""
    digest = hashlib.sha256(factors.weight_hash)
    for x in (factors.u, factors.s, factors.vh):
        digest.update(str(tuple(x.shape)).encode())
        digest.update(x.numpy().data)
    return digest.hexdigest()


def _read_entry(entry: Path, weight_hash: bytes, shape: torch.Size) -> Factors | None:
    if not entry.is_file():
        return None
    try:
        with safe_open(entry, framework="pt") as file:
            # Cloned into memory aligned as torch's own: products round by alignment, cold and warm must agree.
            u, s, vh = (file.get_tensor(name).clone() for name in ("u", "s", "vh"))
            factors = Factors(u, s, vh, weight_hash)
            stored = (file.metadata() or {}).get("checksum")
    except (SafetensorError, OSError, KeyError) as error:
        logger.warning(f"SVD cache entry {entry} cannot be read ({error}); computing it again")
        return None
    r, tensors = min(shape), (factors.u, factors.s, factors.vh)
    fits = [x.shape for x in tensors] == [(shape[0], r), (r,), (r, shape[1])]
    if not fits or any(x.dtype != torch.float32 for x in tensors) or stored != _checksum(factors):
        logger.warning(f"SVD cache entry {entry} is damaged (checksum); computing it again")
        return None
    return factors


def _write_entry(entry: Path, factors: Factors) -> None:
    temporary = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.tmp")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"u": factors.u, "s": factors.s, "vh": factors.vh}
        save_file(tensors, temporary, metadata={"checksum": _checksum(factors)})
        os.replace(temporary, entry)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        logger.warning(f"SVD cache entry {entry} cannot be written ({error}); it will be computed again next time")
