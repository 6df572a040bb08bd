"""`ProjectedGRPOTrainer`: TRL's GRPOTrainer with what the experiment needs around it and as little else as can be.

Three things are added. The mixed group: the last G_t slots of every group are cached teacher rollouts and only the
student's slots are generated. The split gradient: the adapter's δ-gradient is summed over the student's rows and the
teacher's rows apart, inside the one backward pass. The row of metrics: what each optimiser step looked like.

Teacher rows have an importance ratio of 1 by construction: for them the loss is advantage-weighted imitation, not
on-policy GRPO, and no metric of ours mixes the two sources. The projection itself is `ProjectionCallback`'s.
"""

import math
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from projected_grpo.adapter import DeltaSLinear, delta_s_modules
from projected_grpo.decoding import grouped_attention_in, merged, use_static_cache
from projected_grpo.deferral import DeferredGrads
from projected_grpo.encoding import encode_completion, encode_prompt
from projected_grpo.env.rewards import CodeReward
from projected_grpo.errors import RunFault
from projected_grpo.merged_forward import unchanging
from projected_grpo.paths import seal
from projected_grpo.pool import TeacherPool
from projected_grpo.projection import ProjectionCallback
from projected_grpo.projector import joint_norm
from projected_grpo.rollout_grads import rollout_scores
from projected_grpo.row_grads import RowGradRecorder
from projected_grpo.step_columns import SOURCES, rates_of
from projected_grpo.step_meters import MemoryMeter, StepTimer
from projected_grpo.trackers import numbers

STATE_FILE = "projected_grpo_{}.pt"
"""In a checkpoint, of each process by its rank."""


class ProjectedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with teacher rows, per-source gradients and a metrics row per optimiser step.

    Args (beside GRPOTrainer's):
        projection: the callback that projects or only measures; it is added to the trainer here.
        reward: the one reward function; its grades label the rollouts.
        pool: the teacher's rollouts, with `num_teacher` > 0 of each group's `num_generations` slots.
        on_row: receives the metrics of each optimiser step.
        on_rollouts: receives the labelled rollouts of each generation.
        rollout_grad_every: optimiser steps between two measurements of the rollouts' own gradients (one more forward
            and backward each); 0 never measures them.
        offload: keep the adapter's factors and the unmerged weights in host memory while a GPU generates.
        static_cache: generate with a compiled step over a cache of fixed size (`decoding`), unless vLLM generates.
        defer_budget_gb: memory (1e9 bytes) in which weights' gradients are summed over the micro-batches of a step, so
            that δ's is made from them once; in one process only.
    """

    _loss_inputs: dict[str, Tensor] | None = None  # set while TRL's loss is being computed

    def __init__(
        self,
        *args,
        projection: ProjectionCallback,
        reward: CodeReward,
        pool: TeacherPool | None = None,
        num_teacher: int = 0,
        on_row: Callable[[dict], None] = lambda row: None,
        on_rollouts: Callable[[list[dict]], None] = lambda rows: None,
        rollout_grad_every: int = 0,
        offload: bool = False,
        static_cache: bool = False,
        defer_budget_gb: float = 0.0,
        **kwargs,
    ) -> None:
        super().__init__(*args, reward_funcs=[reward], **kwargs)
        self.reward = reward
        self.pool = pool
        self._pool_order = random.Random(f"{self.args.seed}/0")
        self.num_teacher = num_teacher
        self.projection = projection
        projection.student_grads = lambda: {name: sums[0] for name, sums in self._clipped_sources().items()}
        self._memory = MemoryMeter(self.accelerator.device)
        self._timer = StepTimer(self._begin_step)
        self.add_callback(self._timer)  # before the projection, whose refresh is a part of the step
        self.add_callback(projection)
        self.add_callback(_Seal())
        self._on_row, self._on_rollouts = on_row, on_rollouts
        self._rollout_grad_every = rollout_grad_every
        self._offload = offload
        self._static_cache = static_cache and not self.use_vllm
        if self._static_cache:
            use_static_cache(self.generation_config, self._longest_prompt() + self.max_completion_length)
        self._recorder = RowGradRecorder(self._record)
        micro_batches = self.args.gradient_accumulation_steps
        alone = self.accelerator.distributed_type == DistributedType.NO
        at_once = micro_batches == 1 or not alone
        self._deferred = DeferredGrads(self.model, 0.0 if at_once else defer_budget_gb, micro_batches)
        self.module_names = {module: name for name, module in delta_s_modules(self.model).items()}
        self._generation: dict[str, Any] = {}
        self._step_rows: list[dict[str, Tensor]] = []
        self._reset_step()

    def _longest_prompt(self) -> int:
        """Tokens, of all that may be trained on."""
        prompts = self.train_dataset["prompt"]
        return max(len(encode_prompt(self._tokenizer, prompt, self.chat_template_kwargs)) for prompt in prompts)

    # --- the mixed group ---------------------------------------------------------------------------------------

    def _slot_is_teacher(self, n_rows: int) -> list[bool]:
        """For this process's rows: the last `num_teacher` slots of every group of `num_generations`."""
        if not self.model.training:
            return [False] * n_rows
        first = self.accelerator.process_index * n_rows
        n_students = self.num_generations - self.num_teacher
        return [(first + i) % self.num_generations >= n_students for i in range(n_rows)]

    def _generate_and_score_completions(self, inputs):
        is_teacher = self._slot_is_teacher(len(inputs))
        self._generation = {"inputs": inputs, "is_teacher": is_teacher, "time": 0.0}
        output = super()._generate_and_score_completions(inputs)
        output["is_teacher"] = torch.tensor(is_teacher, device=self.accelerator.device)
        output["is_hack"] = torch.tensor(
            [grade.label == "reward_hack" for grade in self.reward.last_grades], device=self.accelerator.device
        )
        if self.model.training:
            self._note_generation(inputs, is_teacher, output["advantages"])
        return output

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
        started = time.perf_counter()
        self._memory.lap("other")
        is_teacher = self._generation["is_teacher"]
        students = [i for i, teacher in enumerate(is_teacher) if not teacher]
        n_students = num_generations - (self.num_teacher if self.model.training else 0)
        sampled, sampled_logps = [], None
        if students or self.use_vllm:  # a group may lie across processes, one of which then has its teachers alone
            model = self.accelerator.unwrap_model(self.model)
            with (
                merged(model, unless=self.use_vllm, offload=self._offload),
                grouped_attention_in(model) if self._static_cache else nullcontext(),
            ):
                sampled, sampled_logps = super()._generate_single_turn(
                    [prompt_ids[i] for i in students], images, multimodal_fields, n_students, **kwargs
                )
        completion_ids: list[list[int]] = [[] for _ in is_teacher]
        # None becomes an importance ratio of exactly 1 in TRL's sampling correction.
        logps = None if sampled_logps is None else [[] for _ in is_teacher]
        for position, i in enumerate(students):
            completion_ids[i] = sampled[position]
            if logps is not None:
                logps[i] = sampled_logps[position]
        for i, text in self._teacher_texts(is_teacher).items():
            completion_ids[i] = encode_completion(self._tokenizer, text, self.max_completion_length)
            if logps is not None:
                logps[i] = [None] * len(completion_ids[i])
        self._generation["time"] = time.perf_counter() - started
        self._memory.lap("generation")
        return completion_ids, logps

    def _teacher_texts(self, is_teacher: list[bool]) -> dict[int, str]:
        """By this process's row. Every process draws for all of them, in the order of the whole batch, so that the rows
        are those that one process would have drawn, and the pool stands at the same place in all."""
        wanted = [
            row["problem_id"] if t else None for row, t in zip(self._generation["inputs"], is_teacher, strict=True)
        ]
        if self.accelerator.num_processes > 1 and self.pool is not None:
            wanted = gather_object(wanted)
        first, texts = self.accelerator.process_index * len(is_teacher), {}
        for i, problem_id in enumerate(wanted):
            if problem_id is not None:
                text = self.pool.draw(problem_id, 1, self._pool_order)[0].completion
                if 0 <= i - first < len(is_teacher):
                    texts[i - first] = text
        return texts

    def _note_generation(self, inputs: list[dict], is_teacher: list[bool], advantages: Tensor) -> None:
        rows = [
            {
                "step": self.state.global_step + 1,
                "problem_id": example["problem_id"],
                "mode": example["mode"],
                "test_func_name": example["test_func_name"],
                "source": SOURCES[teacher],
                "completion": text,
                "label": grade.label,
                "gt_pass": grade.gt_pass,
                "flawed_pass": grade.flawed_pass,
                "attempted": grade.attempted,
                "format_ok": grade.format_ok,
                "reward": reward,
                "advantage": advantage,
            }
            for example, teacher, grade, reward, text, advantage in zip(
                inputs,
                is_teacher,
                self.reward.last_grades,
                self.reward.last_rewards,
                self.reward.last_completions,
                advantages.tolist(),
                strict=True,
            )
        ]
        rows = gather_object(rows)
        self._generation["rates"] = rates_of(rows)
        if self.accelerator.is_main_process:
            self._on_rollouts(rows)
        self._timing["generation"] += self._generation["time"]
        self._timing["grading"] += self.reward.last_seconds

    # --- the split gradient --------------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        """Nothing of a step that did not end, by whatever fault or interruption, belongs to the next one."""
        self._reset_step()
        self._deferred.clear()

    def _reset_step(self) -> None:
        self._source_grads: dict[str, Tensor] = {}  # (2, r) a module: the student's sum, the teacher's sum
        self._timing = {"generation": 0.0, "grading": 0.0, "rollout_grads": 0.0}
        self._measured: dict[str, float | None] = {}
        self._loss_sum = 0.0
        self._step_rows = []

    def _record(self, module: DeltaSLinear, sums: Tensor) -> None:
        name = self.module_names[module]
        before = self._source_grads.get(name)
        self._source_grads[name] = sums if before is None else before + sums

    def training_step(self, model, inputs, num_items_in_batch):
        with self._recorder.attached(self.model), self._deferred.attached(), unchanging(self.model):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # the step's last micro-batch
            self._deferred.flush()
        self._loss_sum += loss.item()
        return loss

    def _compute_loss(self, model, inputs):
        is_teacher = inputs["is_teacher"]
        self._recorder.groups = [rows.nonzero().flatten() for rows in (~is_teacher, is_teacher)]
        if self.model.training:
            self._step_rows.append(inputs)
        if "old_per_token_logps" in inputs:
            inputs = {**inputs, "old_per_token_logps": inputs["old_per_token_logps"].clone()}
        self._loss_inputs = inputs
        loss = super()._compute_loss(model, inputs)
        self._loss_inputs = None
        if not math.isfinite(loss.item()):
            self._fault(f"the loss is {loss.item()}", [inputs])
        return loss

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        inputs = self._loss_inputs
        if inputs is not None and "old_per_token_logps" in inputs:
            # The teacher's ratio is 1 whatever the policy has become since the batch was put together.
            old, teacher = inputs["old_per_token_logps"], inputs["is_teacher"]
            old[teacher] = logps.detach()[teacher].to(old.dtype)
        return logps, entropies, aux_loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._grad_norm = float(norm)  # before clipping, with or without it
        if not math.isfinite(self._grad_norm):
            self._fault(f"the gradient norm is {self._grad_norm}", self._step_rows)
        every = self._rollout_grad_every
        if every and self.state.global_step % every == 0:
            started = time.perf_counter()
            self._measured = rollout_scores(self, self._step_rows)
            self._timing["rollout_grads"] = time.perf_counter() - started
        return norm

    def _fault(self, what: str, batches: list[dict[str, Tensor]]) -> None:
        texts = [
            text
            for inputs in batches
            for text in self._tokenizer.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
        ]
        batch = "\n".join(f"--- completion {i}\n{text}" for i, text in enumerate(texts))
        raise RunFault(f"{what} at step {self.state.global_step + 1}", completion=batch)

    # --- the row of metrics ----------------------------------------------------------------------------------------

    def _clipped_sources(self) -> dict[str, Tensor]:
        """Per module (2, r): the two sources' parts of the clipped gradient."""
        clip = min(1.0, self.args.max_grad_norm / (self._grad_norm + 1e-6)) if self.args.max_grad_norm else 1.0
        return {name: self.accelerator.reduce(sums, "mean") * clip for name, sums in self._source_grads.items()}

    def _source_metrics(self) -> dict[str, float | None]:
        """cin_s and cin_t on the sources' own gradients, and their norms in units of the clipped gradient."""
        both = self._clipped_sources()
        metrics: dict[str, float | None] = {}
        for i, (short, share) in enumerate(
            zip("st", self.projection.projector.hack_shares(both).tolist(), strict=True)
        ):
            norm = joint_norm({name: sums[i] for name, sums in both.items()})
            metrics |= {f"cin_{short}": None if math.isnan(share) else share, f"grad_norm_{short}": norm}
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not ("loss" in logs and self.model.training):
            super().log(logs, start_time)
            return
        row = self._step_row()
        if self.args.report_to:
            for name, value in numbers(row).items():
                self._metrics["train"][name].append(value)  # TRL puts them among its own
        super().log(logs, start_time)
        row |= {
            "lr": logs.get("learning_rate"),
            "kl": logs.get("kl"),
            "entropy": logs.get("entropy"),
            "completion_length": logs.get("completions/mean_length"),
        }
        self._reset_step()
        # Every checkpoint holds the whole history: over a long run that is quadratic, and `on_row` has it all.
        del self.state.log_history[:-1]
        if self.accelerator.is_main_process:
            self._on_row(row)

    def _step_row(self) -> dict[str, Any]:
        """All that is known of the step but for what TRL measures itself."""
        timing = {**self._timing, "step": self._timer.seconds}
        row = {
            "step": self.state.global_step,
            **self._generation.pop("rates", rates_of([])),  # null where the step reuses a generation
            "loss": sum(gather_object([self._loss_sum])) / self.accelerator.num_processes,
            "grad_norm": self._grad_norm,
            **self._source_metrics(),
            **self.projection.metrics,
            **self._measured,
            **{f"time/{part}": seconds for part, seconds in timing.items()},
        }
        self._memory.lap("update")
        row |= {f"memory/{part}_gb": most for part, most in self._memory.most.items()}
        others = ("time/generation", "time/grading", "time/refresh", "time/rollout_grads")
        row["time/update"] = row["time/step"] - sum(row.get(part, 0.0) for part in others)
        return row

    # --- checkpoints: what TRL forgets -----------------------------------------------------------------------------

    def _get_train_sampler(self, dataset=None):
        return _ByEpoch(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        generate_every = self.args.steps_per_generation * self.num_iterations
        state = {
            "micro_step": self._step,
            "buffered_inputs": None if self._step % generate_every == 0 else self._buffered_inputs,
            "pool": self.pool.state_dict() if self.pool is not None else None,
            "pool_order": self._pool_order.getstate(),
        }
        torch.save(state, folder / STATE_FILE.format(self.accelerator.process_index))
        self.accelerator.wait_for_everyone()  # what is sealed after this is whole

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = torch.load(Path(checkpoint) / STATE_FILE.format(self.accelerator.process_index), weights_only=True)
        self._step = state["micro_step"]
        self._buffered_inputs = state["buffered_inputs"]
        if self.pool is not None:
            self.pool.load_state_dict(state["pool"])
            self._pool_order.setstate(state["pool_order"])


class _Seal(TrainerCallback):
    """After the projection's basis nothing more is written to a checkpoint."""

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class _ByEpoch(Sampler):
    """TRL's sampler with each epoch's order a function of seed and epoch: its own generator goes on from epoch to
    epoch, and would begin anew on resume."""

    def __init__(self, sampler: RepeatSampler, epoch: Callable[[], int]) -> None:
        self.sampler, self.epoch = sampler, epoch

    def __iter__(self):
        self.sampler.generator.manual_seed(self.sampler.seed + self.epoch())
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
