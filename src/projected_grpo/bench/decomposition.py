"""The decomposition of a weight by its routes, and how exact each is."""

from functools import partial

import torch

from projected_grpo.bench.timing import Timings, in_turn, machine
from projected_grpo.svd import Route, decompose


def bench_svd(d_out: int, d_in: int, device: torch.device, rounds: int) -> Timings:
    """Seconds of each route on a normal matrix of one shape; `auto` is what the adapter takes."""
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0)).to(device) / d_in**0.5
    routes: tuple[Route, ...] = ("svd", "gram", "auto")
    seconds = in_turn({route: partial(decompose, weight, route) for route in routes}, rounds, device)
    notes = []
    for route in routes:
        u, s, vh = decompose(weight, route)
        eye = torch.eye(len(s), dtype=u.dtype, device=device)
        errors = ((u * s) @ vh - weight, u.T @ u - eye, vh @ vh.T - eye)
        rebuilt, left, right = (error.abs().max().item() for error in errors)
        notes.append(f"{route}: max-norm errors: W {rebuilt:.1e}, UᵀU {left:.1e}, Vh Vhᵀ {right:.1e}")
    about = {"shape": f"{d_out} x {d_in}", "dtype": "float64"} | machine(device)
    return Timings("decomposition", seconds, about, {("auto", "svd"): 1.1}, tuple(notes))
