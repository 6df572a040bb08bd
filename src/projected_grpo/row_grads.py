"""Gradients of δ by groups of rows, out of one ordinary backward pass.

Rows of a batch do not mix inside a linear layer, so the gradient of δ is a sum over rows, and any partition of them has
its own share of it: the student's rows and the teacher's, or every row for itself. Left out on purpose: inputs without
a row dimension, where nobody can say what a row is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from projected_grpo.adapter import DeltaSLinear, delta_s_modules


class RowGradRecorder:
    """Records ∂L/∂δ of each group of rows while it is attached.

    `on_grad` receives (module, grads) for every backward through a module, several times per step under gradient
    accumulation, or once for all of them where `DeferredGrads` waits: grads of shape (groups, r) where `groups` is set,
    else (rows, r), a row each. `groups` are the indices of each group's rows and have to hold every row of the coming
    forwards once.
    """

    def __init__(self, on_grad: Callable[[DeltaSLinear, Tensor], object]) -> None:
        self.on_grad = on_grad
        self.groups: Sequence[Tensor] | None = None

    def groups_of(self, x: Tensor) -> Sequence[Tensor] | None:
        """The groups of this forward's rows. Raises ValueError for an input that they do not fit."""
        if x.ndim != 3:
            raise ValueError(f"per-row gradients need inputs of shape (rows, tokens, features), got {tuple(x.shape)}")
        if self.groups is not None and sum(map(len, self.groups)) != len(x):
            raise ValueError(f"groups of {sum(map(len, self.groups))} rows were set, the input has {len(x)}")
        return self.groups

    def expand(self, module: DeltaSLinear, delta: Float[Tensor, " r"], x: Tensor) -> Float[Tensor, "B 1 r"]:
        """δ as one copy a row, so that autograd returns ∂L/∂δ row by row on its way to the sum: for the plain
        forward."""
        groups, rows = self.groups_of(x), delta.expand(x.shape[0], 1, -1)

        def note(grad: Tensor) -> None:
            grad = grad.squeeze(1).detach()
            self.on_grad(module, grad if groups is None else torch.stack([grad[own].sum(0) for own in groups]))

        rows.register_hook(note)
        return rows

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator["RowGradRecorder"]:
        """Record every forward and backward inside the block, then leave the model as it was."""
        before = {module: module.recorder for module in delta_s_modules(model).values()}
        for module in before:
            module.recorder = self
        try:
            yield self
        finally:
            for module, recorder in before.items():
                module.recorder = recorder
