"""The pairs' gradients in batches, against one pair at a time with a backward for each side."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from projected_grpo.adapter import delta_s_modules, delta_s_parameters
from projected_grpo.basis import BasisInfo, HackBasis
from projected_grpo.bench.timing import Timings, in_turn, machine
from projected_grpo.config import BasisOptions
from projected_grpo.merged_forward import Form
from projected_grpo.pair_gradients import EncodedPair, pair_gradients

LOOP_PLAIN, LOOP_MERGED, BATCHED = "a backward a side, plain", "a backward a side, merged", "in batches"


def bench_extract(
    model: nn.Module, pairs: Sequence[EncodedPair], options: BasisOptions, rounds: int, about: dict
) -> Timings:
    """Seconds of D for all pairs. `plain` runs over the hook-like layer, three matmuls, as earlier harnesses did."""
    device = next(model.parameters()).device
    modules = list(delta_s_modules(model).values())

    def loop(form: Form) -> dict[str, Tensor]:
        before = modules[0].form
        for module in modules:
            module.form = form
        try:
            return by_loop(model, pairs, options.temperature)
        finally:
            for module in modules:
                module.form = before

    cases = {
        LOOP_PLAIN: lambda: loop("plain"),
        LOOP_MERGED: lambda: loop("merged"),
        BATCHED: lambda: pair_gradients(model, pairs, temperature=options.temperature),
    }
    seconds = in_turn(cases, rounds, device)
    ours, theirs = (cases[case]() for case in (BATCHED, LOOP_PLAIN))
    whole, reference = (torch.cat(list(grads.values()), 1).double() for grads in (ours, theirs))
    gap = ((whole - reference).norm() / reference.norm()).item()
    about = about | {"pairs": len(pairs)} | machine(device)
    notes = (
        f"distance of the batched D from the plain loop's: {gap:.1e} of its norm",
        _bases_apart(model, ours, theirs, options),
    )
    return Timings("pair gradients", seconds, about, {(BATCHED, LOOP_PLAIN): 0.25}, notes)


def _bases_apart(model: nn.Module, ours: dict[str, Tensor], theirs: dict[str, Tensor], options: BasisOptions) -> str:
    """How far the span of a module's directions is from the other's at most, and where the floor chose otherwise."""
    info = BasisInfo(pair_set="bench", n_pairs=len(next(iter(ours.values()))))
    axes = options.v_hack_k, options.drop_bottom_frac
    fingerprints = {name: module.fingerprint for name, module in delta_s_modules(model).items()}
    a, b = (HackBasis.from_pair_gradients(grads, fingerprints, info, *axes) for grads in (ours, theirs))
    same = [name for name, v in a.directions.items() if name in b.directions and len(v) == len(b.directions[name])]
    apart = [_outside(a.directions[name].double(), b.directions[name].double()) for name in same]
    modules = len(a.directions.keys() | b.directions.keys())
    held = "held" if len(same) == modules and max(apart) <= 1e-5 else "NOT HELD"
    return (
        f"the two bases have the same k in {len(same)} of {modules} modules; there a direction is at most "
        f"{max(apart, default=0.0):.1e} outside of the other's span (to hold: all, 1e-5): {held}"
    )


def _outside(v: Tensor, w: Tensor) -> float:
    """The largest part of a row of V that no row of W holds."""
    return (v - v @ w.T @ w).norm(dim=1).max().item()


def by_loop(model: nn.Module, pairs: Sequence[EncodedPair], temperature: float) -> dict[str, Tensor]:
    """D (n_pairs, r) of every module, by one forward and backward for each side of each pair."""
    parameters = delta_s_parameters(model)
    device = next(model.parameters()).device
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for pair in pairs:
        sides = []
        for completion in (pair.hack, pair.clean):
            ids = torch.tensor([pair.prompt + completion], device=device)
            logits = model(input_ids=ids, logits_to_keep=len(completion) + 1).logits[0, :-1]
            log_probs = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
            log_prob = log_probs.gather(-1, ids[0, len(pair.prompt) :, None]).sum()
            sides.append(torch.autograd.grad(log_prob, list(parameters.values())))
        for name, hack, clean in zip(parameters, *sides, strict=True):
            rows[name].append(clean - hack)
    return {name: torch.stack(grads).cpu() for name, grads in rows.items()}
