"""The forward over merged weights, and δ's gradient out of its backward.

    y = x W'ᵀ + b,  W' = W + U diag(δ) Vh        dL/dx = dL/dy W'
    dL/dδ = Σ_tokens (Uᵀ dL/dy) ∘ (Vh x)  =  diag(Uᵀ G Vhᵀ),  G = Σ_tokens dL/dy xᵀ

One matmul forward where `DeltaSLinear`'s plain forward, its reference, has three. The right-hand form of δ's gradient
costs one product of the size of a weight's gradient and a small one that no token is in; the left-hand one is cheaper
for few tokens, and is the one that knows single rows. At δ = 0 the weight is W itself, and the output the base model's
bit for bit.

In bfloat16, W + U diag(δ) Vh rounded to the nearest is W wherever the change is under half a step of W: of a δ of 1e-3
an eighth arrives, of one of 3e-3 a third (docs/performance.md). So W' is rounded up or down by a threshold that is
spread evenly over the matrix, as in printing with dots: what is lost in one place is gained in the next, the change
arrives whole, and the weight that is sampled from is the weight that is scored.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from projected_grpo.adapter import DeltaSLinear
    from projected_grpo.row_grads import RowGradRecorder

Form = Literal["merged", "plain"]
# The fractions of 1/ρ and 1/ρ², ρ³ = ρ + 1, in 65536ths: the plane's most even lattice of one step each way.
_ROW_STEP, _COLUMN_STEP = 49471, 37345


def rounded(wide: Float[Tensor, "d_out d_in"], dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
    """`wide` in `dtype`; in bfloat16 by an ordered threshold and not to the nearest. What fits exactly stays."""
    if dtype != torch.bfloat16 or wide.dtype == torch.bfloat16:
        return wide.to(dtype)
    rows, columns = (torch.arange(n, device=wide.device, dtype=torch.int32) for n in wide.shape)
    threshold = (rows[:, None] * _ROW_STEP + columns * _COLUMN_STEP) & 0xFFFF
    # A bfloat16 is the upper half of a float32: what is added to the lower half carries over into it, or is cut off.
    lifted = (wide.float().view(torch.int32) + threshold) & ~0xFFFF
    return torch.where(wide.isfinite(), lifted.view(torch.float32), wide).to(dtype)


class MadeOf(NamedTuple):
    """What an effective weight depends on, besides δ's values."""

    adapters: tuple[str, ...]
    pointer: int
    version: int | None
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class EffectiveWeight:
    """W' of one module, and what it was made of."""

    weight: Float[Tensor, "d_out d_in"]
    delta: Float[Tensor, " r"]
    made_of: MadeOf

    def of_moved(self, base: Tensor) -> "EffectiveWeight":
        """The same, once W itself lies elsewhere."""
        return replace(self, made_of=self.made_of._replace(pointer=base.data_ptr()))

    def fits(self, delta: Float[Tensor, " r"], made_of: MadeOf) -> bool:
        """By value: whoever has changed δ, and in whatever way, the copy is not used again."""
        return self.made_of == made_of and torch.equal(self.delta, delta)


def effective_weight(
    module: "DeltaSLinear", names: Sequence[str], delta: Float[Tensor, " r"], dtype: torch.dtype
) -> Tensor:
    """W + U diag(δ) Vh in `dtype`, δ being the sum of the adapters `names`: the copy of the last call where nothing has
    changed since."""
    base, delta, parameter = module.unmerged_weight, delta.detach(), module.base_layer.weight
    version = None if parameter.is_inference() else parameter._version
    made_of = MadeOf(tuple(names), base.data_ptr(), version, parameter.device, dtype)
    kept = module.effective
    if kept is None or not (kept.made_of == made_of if module.unchanging else kept.fits(delta, made_of)):
        # A copy made under inference mode could not be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            change = (module.u * delta) @ module.vh if delta.any() else None
            weight = base.to(dtype)  # what is lost of W here is lost in the base model too
            if change is not None:
                weight = rounded(weight + change, dtype)
            kept = EffectiveWeight(weight, delta.clone(), made_of)
        module.effective = kept
    return kept.weight


@contextmanager
def unchanging(model: nn.Module) -> Iterator[None]:
    """Inside the block nobody changes a δ: the kept copies are compared with it here, all at once. On a GPU each module
    would otherwise wait for its own comparison in every forward."""
    from projected_grpo.adapter import delta_s_modules

    modules = [module for module in delta_s_modules(model).values() if module.form == "merged"]
    kept = [module for module in modules if module.effective is not None and module.active_delta_s]
    if kept:
        now = [module.delta_s_sum(module.active_delta_s).detach() for module in kept]
        equal = [(module.effective.delta == delta).all() for module, delta in zip(kept, now, strict=True)]
        for module, holds in zip(kept, torch.stack([x.to(equal[0].device) for x in equal]).tolist(), strict=True):
            if not holds:
                module.effective = None
    before = [module.unchanging for module in modules]
    for module in modules:
        module.unchanging = True
    try:
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module.unchanging = was


@torch.compiler.disable  # neither the copy that is kept nor the recorder is part of a graph
def merged_linear(
    module: "DeltaSLinear", x: Float[Tensor, "*batch d_in"], names: Sequence[str]
) -> Float[Tensor, "*batch d_out"]:
    """y under the adapters `names`, in the precision of the base layer's own output."""
    delta = module.delta_s_sum(names)
    dtype = module.base_layer.weight.dtype
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
    recorder = module.recorder if torch.is_grad_enabled() and delta.requires_grad else None
    groups = None if recorder is None else recorder.groups_of(x)
    weight = effective_weight(module, names, delta, dtype)
    return _MergedLinear.apply(x, delta, module, names, weight, recorder, groups)


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, module: Any, names: Any, weight: Tensor, recorder: Any, groups: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.module, ctx.names, ctx.recorder, ctx.groups = module, names, recorder, groups
        bias = module.base_layer.bias
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight, None if bias is None else bias.to(weight.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        grad_x = grad_delta = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = dy @ weight
            if ctx.needs_input_grad[1]:
                deferred = ctx.module.deferred
                by_row = ctx.recorder is not None and ctx.groups is None
                if (
                    deferred is None
                    or by_row
                    or not deferred.take(ctx.module, ctx.names, x, dy, ctx.recorder, ctx.groups)
                ):
                    grad_delta = _grad_delta(ctx.module, x, dy, ctx.recorder, ctx.groups)
        return grad_x, grad_delta, None, None, None, None, None


def _grad_delta(
    module: Any, x: Tensor, dy: Tensor, recorder: "RowGradRecorder | None", groups: Sequence[Tensor] | None
) -> Float[Tensor, " r"]:
    u, vh = module.u, module.vh
    d_out, d_in = len(u), vh.shape[1]
    n_groups = 1 if groups is None else sum(len(rows) > 0 for rows in groups)
    by_row = recorder is not None and groups is None
    # Multiplications, but for a common factor 2 r: tokens (d_out + d_in), against tokens max(d_out, d_in) and the small
    # product, r max(d_out, d_in), once for each group.
    if by_row or x.numel() // d_in < n_groups * max(d_out, d_in):
        of_tokens = _by_token(u, vh, x, dy)
        if recorder is None:
            return of_tokens.reshape(-1, u.shape[1]).sum(0)
        rows = of_tokens.sum(1)
        grads = rows if groups is None else torch.stack([rows[own].sum(0) for own in groups])
    elif groups is None:
        return _by_weight_grad(u, vh, x, dy)
    else:
        grads = torch.stack([_by_weight_grad(u, vh, *rows_of(x, dy, own)) for own in groups])
    recorder.on_grad(module, grads)
    return grads.sum(0)


def rows_of(x: Tensor, dy: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows of a group; all of them, and no copy, where it holds all or is None."""
    return (x, dy) if own is None or len(own) == len(x) else (x[own], dy[own])


def _by_token(u: Float[Tensor, "d_out r"], vh: Float[Tensor, "r d_in"], x: Tensor, dy: Tensor) -> Tensor:
    """(Uᵀ dL/dy) ∘ (Vh x) of every token: the two products in the precision of x, theirs in that of U."""
    return (dy @ u.to(dy.dtype)).to(u.dtype) * (x @ vh.T.to(x.dtype))


def _by_weight_grad(u: Float[Tensor, "d_out r"], vh: Float[Tensor, "r d_in"], x: Tensor, dy: Tensor) -> Tensor:
    """diag(Uᵀ G Vhᵀ); zeros for no rows."""
    grad = dy.reshape(-1, len(u)).T @ x.reshape(-1, vh.shape[1])
    if not grad.is_cuda:  # there the product in float32 would cost more than all the rest, and G is rounded already
        grad = grad.to(u.dtype)
    return diagonal_of(u, vh, grad)


def diagonal_of(
    u: Float[Tensor, "d_out r"], vh: Float[Tensor, "r d_in"], grad: Float[Tensor, "d_out d_in"]
) -> Float[Tensor, " r"]:
    """diag(Uᵀ G Vhᵀ), the product in the precision of G."""
    if len(u) <= vh.shape[1]:
        return ((u.T.to(grad.dtype) @ grad) * vh).sum(1)
    return ((grad @ vh.T.to(grad.dtype)) * u).sum(0)
