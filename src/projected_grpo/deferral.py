"""δ's gradient once a step: G = Σ dL/dyᵀ x is summed over the micro-batches, and diag(Uᵀ G Vhᵀ) taken at the end.

The small product costs r² D multiplications for each module and group of rows, whatever the number of tokens. Done once
it no longer counts, but until then G takes d_out x d_in numbers for each group, which is why it has a budget: modules
beyond it have theirs taken at once, as all have without this. Several processes are left out: DDP reduces a gradient
the moment that its backward ends, and here it is not there yet.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from projected_grpo.adapter import DeltaSLinear, delta_s_modules
from projected_grpo.merged_forward import diagonal_of


class DeferredGrads:
    """Holds what the backwards of its model leave with it, at most `budget_gb` (1e9 bytes), until `flush`."""

    def __init__(self, model: nn.Module, budget_gb: float) -> None:
        self._modules = list(delta_s_modules(model).values())
        self._room = budget_gb * 1e9
        self._held: dict[DeltaSLinear, Tensor] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside the block no backward through merged weights of many tokens gives δ its gradient."""
        before = [module.deferred for module in self._modules]
        for module in self._modules:
            module.deferred = self
        try:
            yield
        finally:
            for module, was in zip(self._modules, before, strict=True):
                module.deferred = was

    def take(self, module: DeltaSLinear, parts: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Add the weight's gradient of each group of rows, given as (x, dL/dy); False where there is no room."""
        held = self._held.get(module)
        if held is None:
            size = len(parts) * module.out_features * module.in_features * module.u.itemsize
            if size > self._room:
                return False
            self._room -= size
            held = torch.zeros(
                len(parts), module.out_features, module.in_features, dtype=module.u.dtype, device=module.u.device
            )
            self._held[module] = held
        elif len(held) != len(parts):
            raise ValueError(f"{len(parts)} groups of rows after {len(held)} in the same step; flush between them")
        for total, (x, dy) in zip(held, parts, strict=True):
            left, right = dy.reshape(-1, dy.shape[-1]).T, x.reshape(-1, x.shape[-1])
            if left.dtype == right.dtype == total.dtype:
                total.addmm_(left, right)
            else:
                total.add_(left @ right)
        return True

    def flush(self, on_grad: Callable[[DeltaSLinear, Tensor], object] | None = None) -> None:
        """Give every δ its gradient, as a backward would, and let go of what was held. `on_grad` receives each module
        and its groups' gradients, (groups, r)."""
        while self._held:
            module, held = self._held.popitem()
            self._room += held.nbytes
            with torch.autocast(held.device.type, enabled=False):
                grads = torch.stack([diagonal_of(module.u, module.vh, grad) for grad in held])
            if on_grad is not None:
                on_grad(module, grads)
            total = grads.sum(0)
            for delta in (module.delta_s[name] for name in module.active_delta_s):
                if delta.requires_grad:
                    delta.grad = total.clone() if delta.grad is None else delta.grad + total
