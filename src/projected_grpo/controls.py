"""Bases that a claim about the real one must beat (METHOD 6): the same modules, the same k in each, no floor.

random: Haar-random orthonormal rows; what any subspace of that size does.
random_matched: the same rows, its overshoot set at each step so that it removes the share of ‖g‖ that the real one
    would; what removing that much does. It needs no basis of its own, see `ProjectionCallback(match=...)`.
placebo: pairs whose two sides are equally honest; what a direction of style or of error does.
flipped: hack and clean swapped at random per pair. Only signs of rows of D change, so the span is the real one and
    nothing but the orientation is random: it tests the orientation and is no null.
"""

from dataclasses import replace

import torch

from projected_grpo.basis import HackBasis, orient, plain


def random_basis(real: HackBasis, seed: int) -> HackBasis:
    """Haar-random orthonormal rows in the real basis's modules, k by k.

    QR of a Gaussian matrix with the signs of R's diagonal put into Q is Haar (Mezzadri, arXiv:math-ph/0609050).
    """
    generator = torch.Generator().manual_seed(seed)
    directions = {}
    for name, v in real.directions.items():
        gaussian = torch.randn(v.shape[1], v.shape[0], generator=generator, dtype=torch.float64)
        q, upper = torch.linalg.qr(gaussian)
        directions[name] = plain((q * upper.diagonal().sign()).T)
    return replace(
        real,
        directions=directions,
        singular_values={name: torch.zeros_like(s) for name, s in real.singular_values.items()},
        coefficients={name: torch.zeros_like(c) for name, c in real.coefficients.items()},
        info=replace(real.info, kind="random", seed=seed),
    )


def flipped_basis(real: HackBasis, seed: int) -> HackBasis:
    """The real span, oriented by pairs of which each had its sides swapped with probability 1/2."""
    generator = torch.Generator().manual_seed(seed)
    n_pairs = len(next(iter(real.coefficients.values())))
    swap = torch.randint(0, 2, (n_pairs,), generator=generator) * 2.0 - 1.0
    directions, coefficients = {}, {}
    for name, v in real.directions.items():
        directions[name], coefficients[name] = orient(v, real.coefficients[name] * swap[:, None])
    return replace(
        real, directions=directions, coefficients=coefficients, info=replace(real.info, kind="flipped", seed=seed)
    )
