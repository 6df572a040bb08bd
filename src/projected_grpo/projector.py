"""The arithmetic of the projection (METHOD 4 and 5): what a gate takes out of gradients, updates and displacements.

Per module with c = V g:
    one_sided  g ← g - f relu(c) V      no_gate  g ← g - f c V      reverse  g ← g - 2 f relu(c) V
with the overshoot f = 1 unless set.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from scipy.linalg import solve_triangular
from scipy.optimize import nnls
from torch import Tensor

from projected_grpo.basis import HackBasis
from projected_grpo.config import Gate

Grads = Mapping[str, Float[Tensor, "*n r"]]


def hackward_part(grad: Float[Tensor, "*m r"], v: Float[Tensor, "*m k r"], gate: Gate) -> Float[Tensor, "*m r"]:
    """What `gate` takes out of `grad` at overshoot 1; of one vector, or of stacks (m, n, r) with v (m, k, r)."""
    return _gated(grad @ v.mT, gate) @ v


def _gated(c: Tensor, gate: Gate) -> Tensor:
    """What `gate` takes of coordinates c = V g."""
    if gate == "no_gate":
        return c
    return c.relu() * (2 if gate == "reverse" else 1)


def project(grad: Float[Tensor, "*m r"], v: Float[Tensor, "*m k r"], gate: Gate, overshoot: float = 1.0) -> Tensor:
    """`grad` without `overshoot` times its hack-ward part."""
    return grad - overshoot * hackward_part(grad, v, gate)


@dataclass(frozen=True)
class Stack:
    """The projected modules of one rank, device and dtype, to be worked on in one go."""

    names: tuple[str, ...]
    v: Float[Tensor, "m k r"]
    """Of a module with fewer axes than the others the last rows are zero, which takes nothing out."""
    n_axes: Int64[Tensor, " m"]

    def gather(self, grads: Grads) -> Float[Tensor, "m n r"]:
        """The modules' gradients, each of shape (r,) (then n is 1) or (n, r)."""
        together = torch.stack([grads[name] for name in self.names])
        return together.reshape(len(self.names), -1, together.shape[-1])

    def scatter(self, together: Float[Tensor, "m n r"], like: Grads) -> dict[str, Tensor]:
        """Inverse of `gather`, in the shapes of `like`."""
        rows = zip(self.names, together.unbind(), strict=True)
        return {name: row.reshape(like[name].shape) for name, row in rows}


@dataclass(frozen=True)
class Projector:
    """A gate over one basis, for the gradients of all modules at once, keyed by module name.

    A gradient is of shape (r,), or (n, r) for n of them, of which each is measured for itself. Modules of equal rank
    are stacked, so that what a step costs does not grow with the number of modules but with their sizes.
    """

    basis: HackBasis
    gate: Gate = "one_sided"
    _stacks: dict[tuple, list[Stack]] = field(default_factory=dict, repr=False, compare=False)

    def select(self, grads: Grads) -> dict[str, Tensor]:
        """The projected modules' gradients; a module without a kept axis is not projected and not measured."""
        return {name: grads[name] for name in self.basis.directions}

    def stacks(self, grads: Grads) -> list[Stack]:
        """The basis on the devices and in the dtypes of `grads`."""
        places = tuple((grads[name].device, grads[name].dtype) for name in self.basis.directions)
        if places not in self._stacks:  # moved there once
            alike: dict[tuple, list[str]] = {}
            for (name, v), place in zip(self.basis.directions.items(), places, strict=True):
                alike.setdefault((v.shape[1], *place), []).append(name)
            self._stacks[places] = [
                _stack({name: self.basis.directions[name] for name in names}, device, dtype)
                for (_, device, dtype), names in alike.items()
            ]
        return self._stacks[places]

    def project(self, grads: Grads, overshoot: float = 1.0, preserve_magnitude: bool = False) -> dict[str, Tensor]:
        """Projected gradients of the projected modules; `preserve_magnitude` restores their joint norm."""
        after: dict[str, Tensor] = {}
        for stack in self.stacks(grads):
            after |= stack.scatter(project(stack.gather(grads), stack.v, self.gate, overshoot), grads)
        if preserve_magnitude:
            norm, before = joint_norm(after), joint_norm(self.select(grads))
            # Of a gradient wholly inside the removed span only rounding is left, which has no norm to restore.
            if norm > 1e-5 * before:
                after = {name: g * (before / norm) for name, g in after.items()}
        return after

    def project_in_metric(self, descent: Grads, inverse_metric: Grads, overshoot: float = 1.0) -> dict[str, Tensor]:
        """The nearest d' to `descent` that the gate lets pass, near being (d' - d)ᵀ P⁻¹ (d' - d) with the diagonal P of
        `inverse_metric`: d' = d - f P Vᵀ λ, with V d' = 0 for `no_gate`, and one-sided with λ >= 0 and V d' <= 0."""
        after: dict[str, Tensor] = {}
        for stack in self.stacks(descent):
            d, v = stack.gather(descent), stack.v.double()
            scaled = v * stack.gather(inverse_metric).double()
            # Small systems, k by k: to the host and back in one go each.
            c, m = ((x @ v.mT).cpu().numpy() for x in (d.double(), scaled))
            amounts = torch.zeros(c.shape, dtype=torch.float64)
            for i, n in enumerate(stack.n_axes.tolist()):
                amounts[i, 0, :n] = torch.from_numpy(self._metric_amounts(m[i, :n, :n], c[i, 0, :n]))
            after |= stack.scatter((d - overshoot * (amounts.to(d.device) @ scaled)).to(d.dtype), descent)
        return after

    def _metric_amounts(self, m: np.ndarray, c: np.ndarray) -> np.ndarray:
        """λ of V P Vᵀ = m and V d = c."""
        if self.gate == "no_gate":
            return np.linalg.solve(m, c)
        # min ½ λᵀ M λ - cᵀ λ over λ >= 0, as least squares by M = L Lᵀ
        lower = np.linalg.cholesky(m)
        return nnls(lower.T, solve_triangular(lower, c, lower=True))[0]

    def hold(self, deltas: Grads, floor: float, overshoot: float = 1.0) -> dict[str, Tensor]:
        """The nearest δ with V δ >= `floor` along every axis; for `no_gate` with V δ = `floor`."""
        held: dict[str, Tensor] = {}
        for stack in self.stacks(deltas):
            delta = stack.gather(deltas)
            back = _gated(floor - delta @ stack.v.mT, self.gate) @ stack.v
            held |= stack.scatter(delta + overshoot * back, deltas)
        return held

    def hack_shares(self, grads: Grads) -> Float64[Tensor, " n"]:
        """`hack_share` of each of n gradients; NaN where one is 0."""
        hackward = energy = torch.zeros((), dtype=torch.float64)
        for stack in self.stacks(grads):
            g = stack.gather(grads)
            c = g @ stack.v.mT
            hackward = _add(hackward, (c if self.gate == "no_gate" else c.relu()).double().square().sum((0, 2)))
            energy = _add(energy, g.double().square().sum((0, 2)))
        return (hackward / energy).sqrt().reshape(-1)

    def hack_share(self, grads: Grads) -> float | None:
        """cin or cout: ‖relu(V g)‖ / ‖g‖ (`no_gate`: ‖V g‖ / ‖g‖) over all projected modules; None where g = 0."""
        share = self.hack_shares(grads).item()
        return None if math.isnan(share) else share

    def null(self, grads: Grads) -> float | None:
        """What `hack_share` would be for random directions, given how this gradient's energy lies over the modules:
        sqrt(Σ_m (k_m / 2 r_m) ‖g_m‖² / Σ_m ‖g_m‖²) one-sided, k_m / r_m for `no_gate`; None where g = 0."""
        sides = 1 if self.gate == "no_gate" else 2
        expected = total = torch.zeros((), dtype=torch.float64)
        for stack in self.stacks(grads):
            energies = stack.gather(grads).double().square().sum((1, 2))
            expected = _add(expected, (stack.n_axes * energies).sum() / (sides * stack.v.shape[2]))
            total = _add(total, energies.sum())
        null = (expected / total).sqrt().item()
        return None if math.isnan(null) else null

    def fired(self, grads: Grads) -> float | None:
        """Share of the projected modules from which the gate takes something; None over an empty basis."""
        hits = torch.zeros((), dtype=torch.int64)
        for stack in self.stacks(grads):
            hits = _add(hits, hackward_part(stack.gather(grads), stack.v, self.gate).any(2).any(1).sum())
        return hits.item() / len(self.basis.directions) if self.basis.directions else None

    def coordinates(self, vectors: Grads) -> Float[Tensor, " n_axes"]:
        """V x over all kept axes of all modules, rank by rank."""
        along = []
        for stack in self.stacks(vectors):
            c = (stack.gather(vectors) @ stack.v.mT).squeeze(1)
            along.append(c[torch.arange(c.shape[1], device=c.device) < stack.n_axes[:, None]].cpu())
        return torch.cat(along) if along else torch.empty(0)


def _stack(directions: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> Stack:
    """Padded on the CPU and moved in one go."""
    n_axes = torch.tensor([len(v) for v in directions.values()])
    padded = torch.zeros(len(directions), int(n_axes.max()), next(iter(directions.values())).shape[1], dtype=dtype)
    for row, v in zip(padded, directions.values(), strict=True):
        row[: len(v)] = v
    return Stack(tuple(directions), padded.to(device), n_axes.to(device))


def _add(total: Tensor, part: Tensor) -> Tensor:
    """On the device of `part`: stacks may lie on several."""
    return total.to(part.device) + part


def joint_norm(vectors: Mapping[str, Tensor]) -> float:
    """Norm of the concatenation, in float64."""
    if not vectors:
        return 0.0
    device = next(iter(vectors.values())).device
    return torch.cat([x.flatten().to(device) for x in vectors.values()]).double().norm().item()


def adam_inverse_metric(deltas: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """P of AdamW's step -lr P m: 1 / √v̂ a coordinate, in units of its module's own root mean square of √v̂ (a factor
    for each module changes no projection); a thousandth of that is added, so that no coordinate without a gradient
    takes everything."""
    metric = {}
    for name, delta in deltas.items():
        state = optimizer.state.get(delta, {})  # a δ that no gradient has reached has none
        root = state["exp_avg_sq"].double().sqrt() if state else torch.zeros_like(delta, dtype=torch.float64)
        size = root.square().mean().sqrt()
        metric[name] = 1 / (root / size + 1e-3) if size > 0 else torch.ones_like(root)
    return metric
