"""Taking the hack-ward part out of a gradient, and measuring what was there (METHOD 4 and 5).

Once per optimiser step, after accumulation and clipping, right before the optimiser, per module with c = V g:
    one_sided  g ← g - f relu(c) V      no_gate  g ← g - f c V      reverse  g ← g - 2 f relu(c) V
with the overshoot f = 1 unless set. With `project_target="update"` the same gate acts on -u of the optimiser's own
step u = δ_after - δ_before, because AdamW rescales every coordinate and a clean gradient does not give a clean step.

At an untouched start the adapter is the identity and so is the callback on a zero gradient. Left out on purpose: any
knowledge of rewards, problems or the trainer's rollouts; a stock TRL or Transformers trainer is enough.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import TrainerCallback

from projected_grpo.adapter import delta_s_parameters
from projected_grpo.basis import HackBasis
from projected_grpo.config import Gate, ProjectTarget
from projected_grpo.errors import InputError

BASIS_FILE = "basis.safetensors"  # in every checkpoint
Grads = Mapping[str, Float[Tensor, " r"]]


def hackward_part(grad: Float[Tensor, " r"], v: Float[Tensor, "k r"], gate: Gate) -> Float[Tensor, " r"]:
    """What `gate` takes out of `grad` at overshoot 1."""
    c = v @ grad
    if gate == "one_sided":
        return c.relu() @ v
    if gate == "reverse":
        return 2 * c.relu() @ v
    return c @ v


def project(grad: Float[Tensor, " r"], v: Float[Tensor, "k r"], gate: Gate, overshoot: float = 1.0) -> Tensor:
    """`grad` without `overshoot` times its hack-ward part."""
    return grad - overshoot * hackward_part(grad, v, gate)


@dataclass(frozen=True)
class Projector:
    """A gate over one basis, for the gradients of all modules at once, keyed by module name."""

    basis: HackBasis
    gate: Gate = "one_sided"
    _placed: dict[tuple, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def select(self, grads: Grads) -> dict[str, Tensor]:
        """The projected modules' gradients; a module without a kept axis is not projected and not measured."""
        return {name: grads[name] for name in self.basis.directions}

    def v(self, name: str, like: Tensor) -> Float[Tensor, "k r"]:
        """V of one module, on the device and in the dtype of `like`."""
        key = name, like.device, like.dtype
        if key not in self._placed:  # moved to the gradients' device once
            self._placed[key] = self.basis.directions[name].to(like.device, like.dtype)
        return self._placed[key]

    def project(self, grads: Grads, overshoot: float = 1.0, preserve_magnitude: bool = False) -> dict[str, Tensor]:
        """Projected gradients of the projected modules; `preserve_magnitude` restores their joint norm."""
        before = self.select(grads)
        after = {name: project(g, self.v(name, g), self.gate, overshoot) for name, g in before.items()}
        # Of a gradient wholly inside the removed span only rounding is left, which has no norm to restore.
        if preserve_magnitude and (norm := joint_norm(after)) > 1e-5 * joint_norm(before):
            scale = joint_norm(before) / norm
            after = {name: g * scale for name, g in after.items()}
        return after

    def hack_share(self, grads: Grads) -> float | None:
        """cin or cout: ‖relu(V g)‖ / ‖g‖ (`no_gate`: ‖V g‖ / ‖g‖) over all projected modules; None where g = 0."""
        chosen = self.select(grads)
        norm = joint_norm(chosen)
        if norm == 0:
            return None
        coefficients = {name: self.v(name, g) @ g for name, g in chosen.items()}
        if self.gate != "no_gate":
            coefficients = {name: c.relu() for name, c in coefficients.items()}
        return joint_norm(coefficients) / norm

    def null(self, grads: Grads) -> float | None:
        """What `hack_share` would be for random directions, given how this gradient's energy lies over the modules:
        sqrt(Σ_m (k_m / 2 r_m) ‖g_m‖² / Σ_m ‖g_m‖²) one-sided, k_m / r_m for `no_gate`; None where g = 0."""
        energies = {name: g.double().square().sum().item() for name, g in self.select(grads).items()}
        total = sum(energies.values())
        if total == 0:
            return None
        sides = 1 if self.gate == "no_gate" else 2
        expected = 0.0
        for name, energy in energies.items():
            k, r = self.basis.directions[name].shape
            expected += k / (sides * r) * energy
        return (expected / total) ** 0.5

    def fired(self, grads: Grads) -> float | None:
        """Share of the projected modules from which the gate takes something; None over an empty basis."""
        chosen = self.select(grads)
        hits = sum(bool(hackward_part(g, self.v(name, g), self.gate).any()) for name, g in chosen.items())
        return hits / len(chosen) if chosen else None

    def coordinates(self, vectors: Grads) -> Float[Tensor, " n_axes"]:
        """V x over all kept axes of all modules."""
        along = [self.v(name, x) @ x for name, x in self.select(vectors).items()]
        return torch.cat(along) if along else torch.empty(0)


def joint_norm(vectors: Mapping[str, Tensor]) -> float:
    """Norm of the concatenation, in float64."""
    if not vectors:
        return 0.0
    return torch.stack([x.double().square().sum() for x in vectors.values()]).sum().sqrt().item()


def _means(rows: list[dict]) -> dict[str, float]:
    """Mean of every metric over the steps in which it had a value."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items() if numbers}


class ProjectionCallback(TrainerCallback):
    """The method as a callback of any TRL or Transformers trainer over a model with one `delta_s` adapter.

    Args:
        basis: the directions, over this very model.
        gate: `one_sided`, `no_gate` or `reverse`.
        overshoot: times what the gate takes out, 1 being exactly that.
        preserve_magnitude: restore the norm of the projected modules' gradient (or update) after the projection.
        project_target: project the gradient, the optimiser's update, or both.
        measure_only: measure all and touch nothing (the vanilla arm).
        match: a second basis; the overshoot of each step is then set so that the share of ‖g‖ taken out is the one
            that `match` would take out (the random_matched control).
        refresh_every: optimiser steps between two extractions on the current policy; 0 keeps the basis.
        refresh: makes the new basis; needed with `refresh_every`.

    After each step `metrics` holds cin, cin_null, cout, cup_in, cup_out, fired, overshoot, the mean of V δ and of
    its two halves (leak, hack-ward; drift, away from it) and, after a refresh, the overlap; None where ‖g‖ = 0.
    """

    def __init__(
        self,
        basis: HackBasis,
        gate: Gate = "one_sided",
        *,
        overshoot: float = 1.0,
        preserve_magnitude: bool = False,
        project_target: ProjectTarget = "grad",
        measure_only: bool = False,
        match: HackBasis | None = None,
        refresh_every: int = 0,
        refresh: Callable[[], HackBasis] | None = None,
    ) -> None:
        for name, value, allowed in (
            ("gate", gate, get_args(Gate)),
            ("project_target", project_target, get_args(ProjectTarget)),
        ):
            if value not in allowed:
                raise InputError(f"{name} {value!r} is unknown; use one of {', '.join(allowed)}")
        if refresh_every < 0 or (refresh_every and refresh is None):
            raise InputError(f"refresh_every={refresh_every} needs a positive number and a refresh function")
        self.projector = Projector(basis, gate)
        self.overshoot = overshoot
        self.preserve_magnitude = preserve_magnitude
        self.project_target = project_target
        self.measure_only = measure_only
        self.match = Projector(match, gate) if match is not None else None
        self.refresh_every = refresh_every
        self.refresh = refresh
        self.metrics: dict[str, float | int | None] = {}
        self._before: dict[str, Tensor] = {}
        self._since_log: list[dict] = []

    @property
    def basis(self) -> HackBasis:
        return self.projector.basis

    def set_basis(self, basis: HackBasis) -> None:
        """Project against `basis` from the next step on, by the same gate."""
        self.projector = Projector(basis, self.projector.gate)

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs) -> None:
        if state.global_step:  # a resumed run goes on with the basis that it had
            saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / BASIS_FILE
            if saved.is_file():
                self.set_basis(HackBasis.load(saved))
        frozen = [name for name, p in delta_s_parameters(model).items() if not p.requires_grad]
        if frozen:
            raise ValueError(f"delta_s of {frozen[0]} is frozen, so there is no gradient to project; make it trainable")
        for projector in filter(None, (self.projector, self.match)):
            projector.basis.check_fits(model)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.metrics = {}
        if self.refresh_every and state.global_step and state.global_step % self.refresh_every == 0:
            started = time.perf_counter()
            new = self.refresh()
            overlap = new.overlap(self.basis)
            self.metrics |= {
                "refresh/overlap": overlap.mean,
                "refresh/overlap_null": overlap.null,
                "refresh/modules_came": overlap.n_came,
                "refresh/modules_went": overlap.n_went,
                "time/refresh": time.perf_counter() - started,
            }
            self.set_basis(new)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, model: nn.Module, **kwargs) -> None:
        parameters = delta_s_parameters(model)
        chosen = self.projector.select(parameters)
        if all(p.grad is None for p in parameters.values()):
            raise RuntimeError("no gradient has reached delta_s, so there is nothing to project or to measure")
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
        overshoot = self._overshoot_for(grads)
        self.metrics |= {
            "cin": self.projector.hack_share(grads),
            "cin_null": self.projector.null(grads),
            "fired": self.projector.fired(grads),
            "overshoot": overshoot,
        }
        if self.project_target in ("grad", "both") and not self.measure_only:
            for name, grad in self.projector.project(grads, overshoot, self.preserve_magnitude).items():
                grads[name].copy_(grad)
        self.metrics |= {
            "cout": self.projector.hack_share(grads),
            "grad_norm_projected": joint_norm(grads),
        }
        self._before = {name: p.detach().clone() for name, p in chosen.items()}

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model: nn.Module, **kwargs) -> None:
        deltas = self.projector.select(delta_s_parameters(model))
        # The gates speak of gradients, along whose negative the optimiser steps: the update's own is -u.
        descent = {name: self._before[name] - delta for name, delta in deltas.items()}
        self.metrics["cup_in"] = self.projector.hack_share(descent)
        if self.project_target in ("update", "both") and not self.measure_only:
            overshoot = self._overshoot_for(descent)
            descent = self.projector.project(descent, overshoot, self.preserve_magnitude)
            for name, step in descent.items():
                deltas[name].copy_(self._before[name] - step)
        self.metrics["cup_out"] = self.projector.hack_share(descent)
        along = self.projector.coordinates(deltas)
        halves = {
            "v_delta": along,
            "v_delta_leak": along.neg().relu(),  # hack-ward: the optimiser steps along -g
            "v_delta_drift": along.relu(),
        }
        self.metrics |= {name: half.mean().item() if len(half) else None for name, half in halves.items()}
        self._before = {}
        self._since_log.append(self.metrics)

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.basis.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / BASIS_FILE)

    def on_log(self, args, state, control, logs: dict | None = None, **kwargs) -> None:
        if logs is not None and "loss" in logs:
            ours = {f"projection/{name}": value for name, value in _means(self._since_log).items()}
            self._since_log = []
            logs.update(ours)  # for the callbacks after this one
            state.log_history[-1].update(ours)  # the trainer put its own copy there already

    def _overshoot_for(self, grads: Grads) -> float:
        if self.match is None:
            return self.overshoot
        theirs, ours = self.match.hack_share(grads), self.projector.hack_share(grads)
        return self.overshoot * theirs / ours if ours else self.overshoot
