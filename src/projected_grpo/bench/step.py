"""A whole GRPO step of ours against one of stock TRL with LoRA, on the same model, prompts and lengths.

Every case is a trainer of its own in a thread of its own, and only the one whose turn it is runs: step by step in
turn, so that what slows the machine slows all. All completions have the full length, whatever the model would do.
"""

import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from projected_grpo.adapter import DeltaSConfig
from projected_grpo.basis import HackBasis
from projected_grpo.bench.timing import Timings, machine, synchronise
from projected_grpo.config import ArmName, TrainConfig
from projected_grpo.env.grader import Grader
from projected_grpo.env.rewards import CodeReward
from projected_grpo.env.sandbox import Limits
from projected_grpo.models import load_model
from projected_grpo.prompting import Prompter, prompt_rows
from projected_grpo.run import check_enough, drop_reference_copy, grpo_config, projection_of
from projected_grpo.sources import assign_modes, problems_of
from projected_grpo.trainer import ProjectedGRPOTrainer

STOCK, VANILLA, PROJECTED = "TRL + LoRA r=32", "vanilla", "projected"
REFRESHED, MEASURED = "projected, refreshed each step", "projected, rollout gradients"
OURS: dict[str, tuple[ArmName, dict[str, Any]]] = {
    VANILLA: ("vanilla", {}),
    PROJECTED: ("projected", {}),
    REFRESHED: ("projected", {"vhack_refresh_every": 1}),  # each step alike, so that a median says something
    MEASURED: ("projected", {"rollout_grad_every": 1}),
}
LIMITS = {(PROJECTED, STOCK): 1.10, (PROJECTED, VANILLA): 1.02, (REFRESHED, PROJECTED): 1.20}  # 10 % at every 2 steps


def bench_step(config: TrainConfig, rounds: int) -> Timings:
    """Seconds of one optimiser step of each case, `rounds` times after a first that is not counted; no teacher rows."""
    config = replace(config, mix_ratio=0.0, teacher_pool=None, rollout_grad_every=0, vhack_refresh_every=0)
    config = replace(config, steps=rounds + 1, save_every=rounds + 2)
    turns = _Turns([STOCK, *OURS])
    with (
        tempfile.TemporaryDirectory(prefix="projected-grpo-bench-") as scratch,
        Grader(config.grader_workers, Limits(cpu_seconds=config.grader_cpu_seconds)) as grader,
    ):
        config = replace(config, out_root=Path(scratch))
        trainers: dict[str, GRPOTrainer] = {STOCK: _stock(config, grader)}
        prompter, basis = _prompter(config), None
        model = get_peft_model(prompter.loaded.model, DeltaSConfig())  # one for all of ours: a large one is large
        for case, (arm, settings) in OURS.items():
            trainers[case] = _ours(replace(config, arm=arm, **settings), grader, model, prompter, basis)
            basis = trainers[case].projection.basis
        device = trainers[STOCK].model.device
        watches = {case: _Watch(case, trainer, turns, device) for case, trainer in trainers.items()}
        turns.run({case: trainer.train for case, trainer in trainers.items()})
    about = {
        "model": config.model,
        "dtype": config.dtype,
        "rows": config.prompts_per_step * config.group_size,
        "tokens a completion": config.max_completion_length,
        "pairs": basis.info.n_pairs,
    }
    notes = [
        f"{case}: generation {1e3 * median(watch.generation[1:]):.0f} ms, the rest "
        f"{1e3 * median(a - b for a, b in zip(watch.seconds[1:], watch.generation[1:], strict=True)):.0f} ms"
        for case, watch in watches.items()
    ]
    shares = [a / b for a, b in zip(watches[PROJECTED].projection[1:], watches[PROJECTED].seconds[1:], strict=True)]
    notes.append(
        f"{PROJECTED}: the projection and what it measures take {1e3 * median(watches[PROJECTED].projection[1:]):.1f} "
        f"ms, {median(shares):.2%} of a step (to hold: at most 1%): {'held' if median(shares) <= 0.01 else 'NOT HELD'}"
    )
    seconds = {case: watch.seconds[1:] for case, watch in watches.items()}
    return Timings("one optimiser step", seconds, about | machine(device), LIMITS, tuple(notes))


def _prompter(config: TrainConfig) -> Prompter:
    return Prompter(load_model(config.model, config.dtype, config.device), config.max_prompt_length, config.wording)


def _common(config: TrainConfig, grader: Grader, prompter: Prompter) -> tuple[dict, CodeReward]:
    problems = problems_of(config.problems)
    check_enough(config, problems)
    rows = prompt_rows(prompter, problems, assign_modes(problems, config.modes))
    args = grpo_config(config, prompter)
    args.generation_kwargs = {"min_new_tokens": config.max_completion_length}
    tokenizer = prompter.loaded.tokenizer
    common = {"args": args, "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    return common, CodeReward(grader, problems)


def _stock(config: TrainConfig, grader: Grader) -> GRPOTrainer:
    prompter = _prompter(config)
    common, reward = _common(config, grader, prompter)
    lora = LoraConfig(r=32, target_modules="all-linear")
    return GRPOTrainer(model=prompter.loaded.model, reward_funcs=[reward], peft_config=lora, **common)


def _ours(
    config: TrainConfig, grader: Grader, model: PeftModel, prompter: Prompter, basis: HackBasis | None
) -> ProjectedGRPOTrainer:
    common, reward = _common(config, grader, prompter)
    trainer = _TwoSources(
        model=model,
        reward=reward,
        projection=projection_of(config, model, prompter, basis),
        rollout_grad_every=config.rollout_grad_every,
        offload=config.offload,
        static_cache=config.static_cache,
        defer_budget_gb=config.defer_budget_gb,
        **common,
    )
    drop_reference_copy(trainer)
    return trainer


class _TwoSources(ProjectedGRPOTrainer):
    """The second half of each group, though sampled, counts as the teacher's, so that the gradients are split."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        slots = torch.arange(len(output["is_teacher"]), device=output["is_teacher"].device) % self.num_generations
        output["is_teacher"] = slots >= self.num_generations // 2
        return output


class _Turns:
    """Lets one of several threads run at a time, in order; one that fails ends all."""

    def __init__(self, names: list[str]) -> None:
        self.waiting = list(names)
        self.failure: BaseException | None = None
        self._changed = threading.Condition()

    def run(self, work: dict[str, Callable[[], object]]) -> None:
        threads = [threading.Thread(target=self._work, args=item, daemon=True) for item in work.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def wait(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or self.waiting[0] == name)
        if self.failure is not None:
            raise _Stopped

    def pass_on(self) -> None:
        with self._changed:
            self.waiting.append(self.waiting.pop(0))
            self._changed.notify_all()

    def _work(self, name: str, run: Callable[[], object]) -> None:
        try:
            self.wait(name)
            run()
        except _Stopped:
            pass
        except BaseException as error:
            self.failure = error
        finally:
            with self._changed:
                self.waiting.remove(name)
                self._changed.notify_all()


class _Stopped(Exception):
    """Another case has failed."""


class _Watch(TrainerCallback):
    """Times a trainer's steps and generations, and gives the turn away between two steps."""

    def __init__(self, case: str, trainer: GRPOTrainer, turns: _Turns, device: torch.device) -> None:
        self.case, self.turns, self.device = case, turns, device
        self.seconds: list[float] = []
        self.generation: list[float] = []
        trainer.remove_callback(PrinterCallback)
        # Before the others: a refresh at the beginning of a step is a part of it.
        trainer.callback_handler.callbacks.insert(0, self)
        self.projection: list[float] = []
        trainer._generate_single_turn = self._timed(trainer._generate_single_turn, self.generation)
        if isinstance(trainer, ProjectedGRPOTrainer):
            for event in ("on_pre_optimizer_step", "on_optimizer_step"):
                setattr(trainer.projection, event, self._timed(getattr(trainer.projection, event), self.projection))

    def _timed(self, call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        def timed(*args, **kwargs):
            synchronise(self.device)
            started = time.perf_counter()
            result = call(*args, **kwargs)
            synchronise(self.device)
            seconds[-1] += time.perf_counter() - started
            return result

        return timed

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.generation:
            self._note()
            self.turns.pass_on()
            self.turns.wait(self.case)
        self.generation.append(0.0)
        self.projection.append(0.0)
        synchronise(self.device)
        self._started = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._note()

    def _note(self) -> None:
        """A step lasts until the next begins: its metrics are made after it."""
        synchronise(self.device)
        self.seconds.append(time.perf_counter() - self._started)
