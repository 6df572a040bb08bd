"""How long an optimiser step takes, and how much memory its parts do."""

import time
from collections.abc import Callable

import torch
from transformers import TrainerCallback


class StepTimer(TrainerCallback):
    """Wall seconds from the beginning of an optimiser step to its end, without logging and saving."""

    def __init__(self, on_begin: Callable[[], None]) -> None:
        self._on_begin = on_begin
        self._started = self.seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._on_begin()
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds = time.perf_counter() - self._started


class MemoryMeter:
    """Most memory allocated on a GPU in each part of a step, over all steps so far, in GB of 1e9 bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.most: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """What was held since the last lap belongs to `part`."""
        if self.device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self.device) / 1e9
            torch.cuda.reset_peak_memory_stats(self.device)
            self.most[part] = max(held, self.most.get(part, 0.0))
            self.most["reserved"] = torch.cuda.max_memory_reserved(self.device) / 1e9  # with what is in pieces
