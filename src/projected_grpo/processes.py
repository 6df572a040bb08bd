"""One run in several processes, as `accelerate launch` starts them: who writes, and what all of them must agree on.

Every process holds the whole model, reads the same files and makes the same basis; rows are shared out, gradients are
averaged by DDP, and the first process alone writes. Without a launcher there is one process and nothing here talks to
anybody. Left out on purpose: sharding (FSDP, ZeRO), which is refused; see `refuse_sharding`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from projected_grpo.errors import InputError

PATIENCE = timedelta(hours=6)
"""The others wait while the first process downloads a model, or decomposes its weights."""


def world_size() -> int:
    """As the launcher says it; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def join(device: str) -> None:
    """Meet the other processes: gloo on the CPU, NCCL on GPUs."""
    if world_size() > 1:
        PartialState(cpu=device == "cpu", timeout=PATIENCE)


def refuse_sharding() -> None:
    """Raises InputError under a launcher that would split the model's tensors over the processes."""
    for variable, name in (
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism config"),
    ):
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise InputError(
                f"{name} is not supported: it splits delta_S over the processes, and the projection needs a module's "
                "whole gradient before the optimiser's step; use plain data parallelism (distributed_type MULTI_GPU)"
            )


@contextmanager
def main_first() -> Iterator[None]:
    """What is computed once into a cache: the first process alone, then the others, who find it there."""
    if world_size() == 1:
        yield
        return
    with PartialState().main_process_first():
        yield


def from_main(value: Any) -> Any:
    """The first process's value, in all of them; anything that can be pickled."""
    return broadcast_object_list([value])[0] if world_size() > 1 else value


def anywhere(flag: bool) -> bool:
    """Whether any process says so."""
    return any(gather_object([flag])) if world_size() > 1 else flag


def wait() -> None:
    """Until all are here."""
    if world_size() > 1:
        PartialState().wait_for_everyone()


def refused_by_main(check: Callable[[], Any]) -> None:
    """What only the first process can check, raised in all of them: a process that waits for one that has left never
    ends. Raises InputError."""
    message = None
    if is_main():
        try:
            check()
        except InputError as error:
            message = str(error)
    if (message := from_main(message)) is not None:
        raise InputError(message)
