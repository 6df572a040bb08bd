"""`projected-grpo train` with completions that do not depend on how many processes there are, for test_processes.py.

Sampling draws from each process's own generator, so that two processes never write what one would have. Here a
student's tokens are a function of step, prompt and place in the whole batch. Each process also leaves the gradient that
its optimiser was given, in FOLDER/gradients_{rank}.pt.

With SAMPLED set to anything it samples after all, as any run does: each process from its own generators.

usage: launched_train.py FOLDER ARGUMENTS OF projected-grpo
"""

import os
import random
import sys
from pathlib import Path

import torch
from trl import GRPOTrainer

from projected_grpo.adapter import delta_s_parameters
from projected_grpo.cli import main
from projected_grpo.projection import ProjectionCallback

folder, arguments = Path(sys.argv[1]), sys.argv[2:]
rank = os.environ.get("RANK", "0")
seen: list[dict[str, torch.Tensor]] = []
project = ProjectionCallback.on_pre_optimizer_step


def written(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
    is_teacher = self._generation["is_teacher"]
    first = self.accelerator.process_index * len(is_teacher)
    places = [first + i for i, teacher in enumerate(is_teacher) if not teacher]
    completions = []
    for ids, place in zip(prompt_ids, places, strict=True):
        draw = random.Random(f"{self.state.global_step}/{ids}/{place}")
        completions.append([draw.randrange(5, 200) for _ in range(draw.randint(3, 12))])
    return completions, None


def noted(self, args, state, control, model, **kwargs):
    project(self, args, state, control, model=model, **kwargs)
    seen.append({name: p.grad.clone() for name, p in delta_s_parameters(model).items()})
    torch.save(seen, folder / f"gradients_{rank}.pt")


if not os.environ.get("SAMPLED"):
    GRPOTrainer._generate_single_turn = written
ProjectionCallback.on_pre_optimizer_step = noted
sys.exit(main(arguments))
