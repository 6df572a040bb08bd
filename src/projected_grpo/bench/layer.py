"""One linear layer over a step's micro-batches, forward and backward: frozen and bare, under PEFT's LoRA, and under
`delta_s` in its forms."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from projected_grpo.adapter import DeltaSConfig, delta_s_modules
from projected_grpo.bench.timing import Timings, in_turn, machine
from projected_grpo.deferral import DeferredGrads
from projected_grpo.row_grads import RowGradRecorder

FROZEN, LORA, PLAIN, MERGED, SPLIT = ("frozen", "LoRA r=32", "delta_s plain", "delta_s merged", "delta_s merged, split")
DEFERRED, BOTH = "delta_s merged, deferred", "delta_s merged, split, deferred"
LIMITS = {(case, to): limit for case in (MERGED, SPLIT, DEFERRED, BOTH) for to, limit in ((FROZEN, 1.6), (PLAIN, 0.5))}


def bench_layer(
    d_out: int,
    d_in: int,
    rows: int,
    tokens: int,
    micro_batches: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
) -> Timings:
    """Seconds of y = layer(x) and its backward from a given dL/dy, with dL/dx, `micro_batches` times after a change of
    δ: x (rows, tokens / rows, d_in).

    `split`: the first half of the rows and the second have each their own gradient of δ, as the student's rows and the
    teacher's have in training. `deferred`: δ's gradient is made once from all micro-batches.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    bare = nn.Sequential(OrderedDict(linear=nn.Linear(d_in, d_out, bias=False, device=device, dtype=dtype)))
    with torch.no_grad():
        next(bare.parameters()).copy_(normal(d_out, d_in) / d_in**0.5)
    bare.requires_grad_(False)
    models: dict[str, nn.Module] = {
        FROZEN: bare,
        LORA: get_peft_model(copy.deepcopy(bare), LoraConfig(r=32, target_modules=["linear"])),
        PLAIN: get_peft_model(copy.deepcopy(bare), DeltaSConfig(target_modules=["linear"], form="plain")),
        MERGED: get_peft_model(copy.deepcopy(bare), DeltaSConfig(target_modules=["linear"])),
    }
    for model in (models[PLAIN], models[MERGED]):
        (module,) = delta_s_modules(model).values()
        with torch.no_grad():
            module.delta_s["default"].copy_(normal(min(d_out, d_in)) * 1e-2)
    x = normal(rows, tokens // rows, d_in).requires_grad_()
    dy = normal(rows, tokens // rows, d_out)
    recorder = RowGradRecorder(lambda module, grads: None)
    recorder.groups = torch.arange(rows, device=device).tensor_split(2)

    deferred = DeferredGrads(models[MERGED], math.inf, micro_batches)

    def step(model: nn.Module) -> None:
        with torch.no_grad():  # as the optimiser does between two steps, so that W' is made anew
            for module in delta_s_modules(model).values():
                module.delta_s["default"].mul_(0.999)
        for _ in range(micro_batches):
            # As TRL trains in half precision: LoRA's own weights are float32.
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                y = model(x)
            y.backward(dy)
            x.grad = None
        if model is models[MERGED]:
            deferred.flush()
        for parameter in model.parameters():
            parameter.grad = None

    def under(*contexts: Callable[[], AbstractContextManager]) -> Callable[[], None]:
        def run() -> None:
            with ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context())
                step(models[MERGED])

        return run

    split = partial(recorder.attached, models[MERGED])
    cases: dict[str, Callable[[], None]] = {name: partial(step, model) for name, model in models.items()}
    cases |= {SPLIT: under(split), DEFERRED: under(deferred.attached), BOTH: under(split, deferred.attached)}
    seconds = in_turn(cases, rounds, device)
    about = {
        "shape": f"{d_out} x {d_in}",
        "micro-batches": micro_batches,
        "tokens each": tokens,
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return Timings("layer, forward and backward", seconds, about | machine(device), LIMITS)
