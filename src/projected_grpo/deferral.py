"""δ's gradient once a step: G = Σ dL/dyᵀ x is summed over the micro-batches, and diag(Uᵀ G Vhᵀ) taken at the end.

The small product costs r² D multiplications for each module and group of rows, whatever the number of tokens. Done once
it no longer counts, but until then G takes d_out x d_in numbers for each group, which is why it has a budget: modules
beyond it have theirs taken at once, as all have without this. Several processes are left out: DDP reduces a gradient
the moment that its backward ends, and here it is not there yet.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from projected_grpo.adapter import DeltaSLinear, delta_s_modules
from projected_grpo.merged_forward import diagonal_of, rows_of

if TYPE_CHECKING:
    from projected_grpo.row_grads import RowGradRecorder


@dataclass
class _Held:
    """What one module's backwards have left: a weight's gradient for each group of rows, None while it had no row."""

    grads: list[Tensor | None]
    recorder: "RowGradRecorder | None"
    dtype: torch.dtype


class DeferredGrads:
    """Holds what the backwards of its model leave with it, at most `budget_gb` (1e9 bytes), until `flush`.

    `micro_batches`: backwards of about equal size in a step, by which it knows whether waiting pays.
    """

    def __init__(self, model: nn.Module, budget_gb: float, micro_batches: int) -> None:
        self._modules = list(delta_s_modules(model).values())
        self._budget = self._room = budget_gb * 1e9
        self._micro_batches = micro_batches
        self._held: dict[tuple[DeltaSLinear, tuple[str, ...]], _Held] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside the block backwards through merged weights may leave δ's gradient here."""
        before = [module.deferred for module in self._modules]
        for module in self._modules:
            module.deferred = self
        try:
            yield
        finally:
            for module, was in zip(self._modules, before, strict=True):
                module.deferred = was

    def take(
        self,
        module: DeltaSLinear,
        names: Sequence[str],
        x: Tensor,
        dy: Tensor,
        recorder: "RowGradRecorder | None",
        groups: Sequence[Tensor] | None,
    ) -> bool:
        """Add the weight's gradient of each group of rows of a backward under the adapters `names`; False where that
        would not pay, or where there is no room."""
        key = module, tuple(names)
        n_groups = 1 if groups is None else len(groups)
        held = self._held.get(key)
        if held is None:
            used = n_groups if groups is None else sum(len(own) > 0 for own in groups)
            # Multiplications, but for a common factor r D: tokens by the weight's gradient and r once a step, against
            # tokens (1 + r / D) by token or, where there are many, by the weight's gradient each time.
            tokens = x.numel() // module.in_features * self._micro_batches
            if tokens < used * max(module.out_features, module.in_features):
                return False
            held = _Held([None] * n_groups, recorder, x.dtype)
        elif len(held.grads) != n_groups or held.recorder is not recorder:
            raise ValueError(f"{n_groups} groups of rows after {len(held.grads)} in one step; flush between them")
        missing = [i for i in range(n_groups) if held.grads[i] is None and (groups is None or len(groups[i]))]
        size = len(missing) * module.out_features * module.in_features * module.u.itemsize
        if size > self._room:
            return False
        self._room -= size
        self._held[key] = held
        for i in range(n_groups):
            if groups is None or len(groups[i]):
                held.grads[i] = _added(held.grads[i], *rows_of(x, dy, None if groups is None else groups[i]), module)
        return True

    def clear(self) -> None:
        """Let go of what is held: the step that it belongs to will not end."""
        self._held.clear()
        self._room = self._budget

    def flush(self) -> None:
        """Give every δ its gradient, and each recorder its groups', (groups, r); let go of what was held."""
        while self._held:
            (module, names), held = self._held.popitem()
            parts = []
            for i, grad in enumerate(held.grads):
                held.grads[i] = None
                if grad is None:
                    parts.append(torch.zeros(module.u.shape[1], dtype=module.u.dtype, device=module.u.device))
                    continue
                self._room += grad.nbytes
                with torch.autocast(grad.device.type, enabled=False):
                    # As without deferral: on a GPU a product in float32 would cost more than all the others.
                    parts.append(diagonal_of(module.u, module.vh, grad.to(held.dtype) if grad.is_cuda else grad))
            grads = torch.stack(parts)
            if held.recorder is not None:
                held.recorder.on_grad(module, grads)
            total = grads.sum(0)
            for delta in (module.delta_s[name] for name in names):
                if delta.requires_grad:
                    delta.grad = total.clone() if delta.grad is None else delta.grad + total


def _added(total: Tensor | None, x: Tensor, dy: Tensor, module: DeltaSLinear) -> Tensor:
    """The weight's gradient of these rows, added in place where there is a sum already."""
    left, right = dy.reshape(-1, dy.shape[-1]).T, x.reshape(-1, x.shape[-1])
    if total is None:
        return (left @ right).to(module.u.dtype)
    return total.addmm_(left, right) if left.dtype == total.dtype else total.add_(left @ right)
