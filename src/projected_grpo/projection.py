"""Taking the hack-ward part out of a gradient, and measuring what was there (METHOD 4 and 5): the callback.

Once per optimiser step, after accumulation and clipping, right before the optimiser, the gate (projector.py) acts on
the gradient. With `project_target="update"` it acts on -u of the optimiser's own step u = δ_after - δ_before, because
AdamW rescales every coordinate and a clean gradient does not give a clean step. With `displacement` nothing is taken
out of a step: after it δ is put back to where V δ is at least a floor.

At an untouched start the adapter is the identity and so is the callback on a zero gradient. Left out on purpose: any
knowledge of rewards, problems or the trainer's rollouts; a stock TRL or Transformers trainer is enough.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from projected_grpo.adapter import delta_s_parameters
from projected_grpo.basis import HackBasis
from projected_grpo.config import Gate, ProjectRows, ProjectTarget, UpdateMetric
from projected_grpo.errors import InputError
from projected_grpo.projector import Grads, Projector, adam_inverse_metric, joint_norm

BASIS_FILE = "basis.safetensors"  # in every checkpoint


def _copy_into(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    """All at once: a kernel for each module would cost more than the projection."""
    if targets:
        torch._foreach_copy_(list(targets.values()), [sources[name] for name in targets])


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
        project_target: project the gradient, the optimiser's update, or both; or `displacement`: after each step hold
            V δ at or above a floor, which starts at 0.
        hold_rate, hold_cap: what that floor rises by at each optimiser step, and where it stops; a cap of 0 is none.
        update_metric: what "nearest" means where the update is projected: `adam` weighs coordinates by the square root
            of AdamW's second moment.
        project_rows: `student` takes out the hack-ward part of the student's rows' gradient alone; it needs a trainer
            that tells sources apart, which sets `student_grads`.
        measure_only: measure all and touch nothing (the vanilla arm).
        match: a second basis; the overshoot of each step is then set so that the share of ‖g‖ taken out is the one
            that `match` would take out (the random_matched control).
        refresh_every: optimiser steps between two extractions on the current policy; 0 keeps the basis.
        refresh: makes the new basis; needed with `refresh_every`.

    After each step `metrics` holds cin, cin_null, cout, cup_in, cup_null, cup_out, cup_away (the share of the step that
    leads away from hacking), the norms before and after each projection, fired, overshoot, the mean of V δ and of
    its two halves (leak, hack-ward; drift, away from it), where δ is held the floor, the share of axes and the norm of
    what was put back, and, after a refresh, the overlap with the basis before it and with the first; None where
    ‖g‖ = 0.
    """

    def __init__(
        self,
        basis: HackBasis,
        gate: Gate = "one_sided",
        *,
        overshoot: float = 1.0,
        preserve_magnitude: bool = False,
        project_target: ProjectTarget = "grad",
        hold_rate: float = 0.0,
        hold_cap: float = 0.0,
        update_metric: UpdateMetric = "euclidean",
        project_rows: ProjectRows = "all",
        measure_only: bool = False,
        match: HackBasis | None = None,
        refresh_every: int = 0,
        refresh: Callable[[], HackBasis] | None = None,
    ) -> None:
        for name, value, allowed in (
            ("gate", gate, get_args(Gate)),
            ("project_target", project_target, get_args(ProjectTarget)),
            ("update_metric", update_metric, get_args(UpdateMetric)),
            ("project_rows", project_rows, get_args(ProjectRows)),
        ):
            if value not in allowed:
                raise InputError(f"{name} {value!r} is unknown; use one of {', '.join(allowed)}")
        if refresh_every < 0 or (refresh_every and refresh is None):
            raise InputError(f"refresh_every={refresh_every} needs a positive number and a refresh function")
        self.projector = Projector(basis, gate)
        self.first_basis = basis
        self.overshoot = overshoot
        self.preserve_magnitude = preserve_magnitude
        self.project_target = project_target
        self.hold_rate = hold_rate
        self.hold_cap = hold_cap or math.inf
        self.update_metric = update_metric
        self.project_rows = project_rows
        self.student_grads: Callable[[], Grads] | None = None
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
        if self.project_rows == "student" and self.student_grads is None:
            raise InputError("project_rows='student' needs a trainer that tells sources apart: ProjectedGRPOTrainer")

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.metrics = {}
        if self.refresh_every and state.global_step and state.global_step % self.refresh_every == 0:
            started = time.perf_counter()
            new = self.refresh()
            overlap = new.overlap(self.basis)
            self.metrics |= {
                "refresh/overlap": overlap.mean,
                "refresh/overlap_null": overlap.null,
                "refresh/overlap_first": new.overlap(self.first_basis).mean,
                "refresh/modules_came": overlap.n_came,
                "refresh/modules_went": overlap.n_went,
                "time/refresh": time.perf_counter() - started,
            }
            self.set_basis(new)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, model: nn.Module, **kwargs) -> None:
        parameters = delta_s_parameters(model)
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
            if self.project_rows == "student":
                theirs = self.student_grads()
                clean = self.projector.project(theirs, overshoot)
                projected = {name: grads[name] - theirs[name] + g for name, g in clean.items()}
            else:
                projected = self.projector.project(grads, overshoot, self.preserve_magnitude)
            _copy_into({name: grads[name] for name in projected}, projected)
        self.metrics |= {
            "cout": self.projector.hack_share(grads),
            "grad_norm_projected": joint_norm(grads),
        }
        self._before = {name: p.detach().clone() for name, p in self.projector.select(parameters).items()}

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model: nn.Module, optimizer=None, **kwargs) -> None:
        deltas = self.projector.select(delta_s_parameters(model))
        # The gates speak of gradients, along whose negative the optimiser steps: the update's own is -u.
        descent = {name: self._before[name] - delta for name, delta in deltas.items()}
        self.metrics["cup_in"] = self.projector.hack_share(descent)
        self.metrics["cup_null"] = self.projector.null(descent)
        self.metrics["update_norm"] = joint_norm(descent)
        if self.project_target in ("update", "both") and not self.measure_only:
            overshoot = self._overshoot_for(descent)
            if self.update_metric == "adam":
                metric = adam_inverse_metric(deltas, optimizer)
                descent = self.projector.project_in_metric(descent, metric, overshoot)
            else:
                descent = self.projector.project(descent, overshoot, self.preserve_magnitude)
            _copy_into(deltas, {name: self._before[name] - step for name, step in descent.items()})
        if self.project_target == "displacement" and not self.measure_only:
            n_steps = state.global_step + 1  # the trainer counts this step after us
            floor = min(self.hold_rate * n_steps, self.hold_cap)
            held = self.projector.hold(deltas, floor, self.overshoot)
            put_back = {name: held[name] - delta for name, delta in deltas.items()}
            moved = self.projector.coordinates(put_back).abs() > 0
            self.metrics |= {
                "hold/floor": floor,
                "hold/axes": moved.double().mean().item() if len(moved) else None,
                "hold/norm": joint_norm(put_back),
            }
            _copy_into(deltas, held)
            descent = {name: self._before[name] - delta for name, delta in deltas.items()}
        self.metrics["cup_out"] = self.projector.hack_share(descent)
        self.metrics["cup_away"] = self.projector.hack_share({name: -step for name, step in descent.items()})
        self.metrics["update_norm_projected"] = joint_norm(descent)
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
