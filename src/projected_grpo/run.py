"""One training run, from a config to a folder that holds all of it: the `train` command."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from datasets import Dataset
from loguru import logger
from peft import PeftModel, get_peft_model
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback
from trl import GRPOConfig
from trl.import_utils import is_vllm_available

from projected_grpo import processes
from projected_grpo.adapter import DeltaSConfig
from projected_grpo.arms import ARMS
from projected_grpo.basis import HackBasis, check_top_k
from projected_grpo.config import TrainConfig
from projected_grpo.decoding import check_compiler
from projected_grpo.encoding import encode_completion
from projected_grpo.env.grader import Grader
from projected_grpo.env.problems import Problem
from projected_grpo.env.rewards import CodeReward
from projected_grpo.env.sandbox import Limits
from projected_grpo.errors import InputError, RunInterrupted, naming_a_full_disk, saving_faults
from projected_grpo.export import Facts, card
from projected_grpo.extract import PairBases, describe, pairs_of
from projected_grpo.models import device_of, load_model
from projected_grpo.pairs import PairSet
from projected_grpo.paths import existing
from projected_grpo.pool import ROLLOUTS, TeacherPool, load_pool
from projected_grpo.projection import ProjectionCallback
from projected_grpo.prompting import Prompter, prompt_rows
from projected_grpo.run_folder import RolloutFile, check_folder, checkpoint_to_resume, rollouts_until, run_folder
from projected_grpo.sources import assign_modes, problems_of
from projected_grpo.steplog import StepLog
from projected_grpo.trackers import RolloutTables, check_trackers
from projected_grpo.trainer import ProjectedGRPOTrainer
from projected_grpo.version import code_version


def train(config: TrainConfig) -> str:
    """Run `config` to its end and return the verdict; the folder then holds everything that DESIGN promises.

    All that can be refused is refused before the folder is touched.

    Raises:
        InputError: bad settings or files, or a folder that is in use or holds another run; nothing was written.
        RunFault: a NaN loss or a fault of the grader; the completions that caused it are in the folder.
        RunInterrupted: Ctrl-C; there is a checkpoint to go on from.
    """
    check_trackers(config.report_to)
    if config.static_cache and config.vllm == "off":
        check_compiler(device_of(config.device))
    if config.vllm != "off" and not is_vllm_available():
        raise InputError(f"--vllm {config.vllm}: vLLM is not installed; install projected-grpo[vllm] on a GPU machine")
    processes.refuse_sharding()
    processes.join(device_of(config.device))
    processes.refused_by_main(lambda: check_folder(config))
    problems = problems_of(config.problems)
    modes = dict(zip((problem.id for problem in problems), assign_modes(problems, config.modes), strict=True))
    pool = _teacher_pool(config, problems, modes)
    if pool is not None and (missing := {problem.id for problem in problems} - pool.problem_ids):
        logger.warning(
            f"teacher pool {config.teacher_pool} has no rollout for {len(missing)} of the {len(problems)} problems of "
            f"{config.problems}; the run trains on the other {len(problems) - len(missing)}"
        )
        problems = [problem for problem in problems if problem.id not in missing]
    pairs = pairs_of(config)
    check_top_k(config.v_hack_k, len(pairs))
    statements = {problem.question for problem in problems}
    if shared := [pair.id for pair in pairs if pair.problem is not None and pair.problem.question in statements]:
        raise InputError(
            f"pair {shared[0]} is over a training problem ({len(shared)} such); pairs and training must not share any"
        )
    check_enough(config, problems)
    basis = _basis_of(config, pairs)
    with processes.main_first():
        loaded = load_model(config.model, config.dtype, config.device)
    prompter = Prompter(loaded, config.max_prompt_length, config.wording, config.max_completion_length)
    dataset = Dataset.from_list(prompt_rows(prompter, problems, [modes[problem.id] for problem in problems]))
    if pool is not None:
        by_id = {problem.id: problem for problem in problems}
        texts = [prompter.completion(by_id[row.problem_id], row.completion) for row in pool.rows]
        long = sum(len(encode_completion(loaded.tokenizer, text)) > config.max_completion_length for text in texts)
        if long:
            logger.warning(
                f"{long} of {len(texts)} teacher rollouts are longer than --max-completion-length "
                f"{config.max_completion_length}; they are cut there and graded as cut"
            )
        pool = TeacherPool([replace(r, completion=t) for r, t in zip(pool.rows, texts, strict=True)], pool.header)
    with processes.main_first():  # the decompositions
        model = get_peft_model(loaded.model, DeltaSConfig())
    callback = projection_of(config, model, prompter, basis)
    args = grpo_config(config, prompter)
    go_on = f"free some and go on with {_resume_line(config)}"
    with naming_a_full_disk(existing(config.run_dir), go_on), run_folder(config) as folder:
        return _train(config, folder, args, model, prompter, dataset, problems, pool, callback)


def _resume_line(config: TrainConfig) -> str:
    return f"projected-grpo train --config {config.run_dir / 'config.json'} --resume"


def check_enough(config: TrainConfig, problems: list[Problem]) -> None:
    """Refuse a step of more problems than there are."""
    if config.prompts_per_step * config.steps_per_generation > len(problems):
        raise InputError(
            f"--prompts-per-step {config.prompts_per_step} x --steps-per-generation {config.steps_per_generation} "
            f"exceeds the {len(problems)} problems of {config.problems}; lower one or add problems"
        )


def _basis_of(config: TrainConfig, pairs: PairSet) -> HackBasis | None:
    """The basis file, which must be a real one made with the run's own settings."""
    if config.basis is None:
        return None
    basis = HackBasis.load(config.basis)
    info = basis.info
    if info.kind != "real":
        raise InputError(f"--basis {config.basis} is a {info.kind} control; give the real basis and name the --arm")
    if info.delta_norm:
        raise InputError(
            f"--basis {config.basis} was extracted from a trained policy; extract one from the model itself"
        )
    for flag, theirs, ours in (
        ("--pairs", info.pair_set_sha256, pairs.sha256),
        ("--v-hack-k", info.top_k, config.v_hack_k),
        ("--drop-bottom-frac", info.drop_bottom_frac, config.drop_bottom_frac),
        ("--token-reduction", info.token_reduction, config.token_reduction),
        ("--temperature", info.temperature, config.temperature),
    ):
        if theirs != ours:
            raise InputError(
                f"--basis {config.basis} was made with another {flag} ({theirs}, the run has {ours}); extract it again "
                f"or set {flag}"
            )
    return basis


def _teacher_pool(config: TrainConfig, problems: list[Problem], modes: dict[str, str]) -> TeacherPool | None:
    if not config.num_teacher:
        return None
    pool = load_pool(config.teacher_pool, problems)
    if unknown := sorted(pool.problem_ids - {problem.id for problem in problems}):
        raise InputError(
            f"teacher pool {config.teacher_pool} has rollouts of {unknown[0]}, no problem of {config.problems}; "
            "build it over the training problems with `projected-grpo pool build`"
        )
    for row in pool.rows:
        if row.mode != modes[row.problem_id]:
            raise InputError(
                f"teacher pool {config.teacher_pool} has problem {row.problem_id} in mode {row.mode}, the run has it "
                f"in {modes[row.problem_id]}; build a pool with the run's --modes"
            )
    return pool


def _train(
    config: TrainConfig,
    folder: Path,
    args: GRPOConfig,
    model: PeftModel,
    prompter: Prompter,
    dataset: Dataset,
    problems: list[Problem],
    pool: TeacherPool | None,
    callback: ProjectionCallback,
) -> str:
    checkpoint = checkpoint_to_resume(config, folder)
    start_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    kind = config.arm, config.gate, config.project_target
    main = processes.is_main()
    with (
        Grader(config.grader_workers, Limits(cpu_seconds=config.grader_cpu_seconds)) as grader,
        StepLog(folder, *kind, config.steps, start_step=start_step) if main else nullcontext() as log,
    ):
        logger.info(f"arm {config.arm}: {ARMS[config.arm].summary}")
        logger.info(f"grader isolation: {', '.join(grader.isolation) or 'resource limits only'}")
        if config.basis is None or callback.basis.info.kind != "real":
            logger.info("\n" + describe(callback.basis))
        if prompter.loaded.note:
            logger.warning(prompter.loaded.note)
        reward = CodeReward(grader, problems, true_reward=ARMS[config.arm].true_reward)
        reward.remember(rollouts_until(folder / ROLLOUTS, start_step))
        trainer = ProjectedGRPOTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            processing_class=prompter.loaded.tokenizer,
            projection=callback,
            reward=reward,
            pool=pool,
            num_teacher=config.num_teacher,
            rollout_grad_every=config.rollout_grad_every,
            offload=config.offload,
            static_cache=config.static_cache,
            defer_budget_gb=config.defer_budget_gb,
            on_row=log.row if log is not None else _nowhere,
            on_rollouts=_on_rollouts(config, folder, start_step) if log is not None else _nowhere,
        )
        drop_reference_copy(trainer)
        trainer.remove_callback(PrinterCallback)  # the step log is this and more
        stopper = StopOnInterrupt()
        trainer.add_callback(stopper)
        for tracker in trainer.callback_handler.callbacks:
            if isinstance(tracker, TensorBoardCallback):
                tracker.logging_dir = str(folder / "tensorboard")
        with saving_faults(folder / "fault.txt"), stopper.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stopper.stopped and trainer.state.global_step < config.steps:
            raise RunInterrupted(
                f"stopped at step {trainer.state.global_step} of {config.steps} with a checkpoint; go on with "
                + _resume_line(config)
            )
        trainer.save_model(str(folder / "adapter"))
        if log is None:
            return ""
        facts = Facts(config, callback.basis.info, [code_version()], prompter.loaded.note, evaluation=None)
        (folder / "adapter" / "README.md").write_text(card(facts, merged=False, name="ADAPTER_FOLDER"))
        callback.basis.save(folder / "basis.safetensors")
        files = {
            "metrics": folder / "metrics.jsonl",
            "rollouts": folder / ROLLOUTS,
            "basis": folder / "basis.safetensors",
            "adapter": folder / "adapter",
        }
        return log.verdict(files, f"projected-grpo eval --run {folder}")


def _nowhere(row: object) -> None:
    """What another process than the first does with what it has to write."""


def drop_reference_copy(trainer: ProjectedGRPOTrainer) -> None:
    """TRL's copy of a ready adapter; at δ = 0 the disabled adapter is the same reference, and free."""
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")


def projection_of(
    config: TrainConfig, model: PeftModel, prompter: Prompter, basis: HackBasis | None
) -> ProjectionCallback:
    arm = ARMS[config.arm]
    if basis is not None:
        basis.check_fits(model)
    bases = PairBases(model, prompter, config, config.max_completion_length, first=basis)
    real = processes.from_main(bases.real())  # on GPUs two of them may round apart
    bases.first = real
    return ProjectionCallback(
        processes.from_main(arm.make_basis(bases)),
        config.gate,
        overshoot=config.overshoot,
        preserve_magnitude=config.preserve_magnitude,
        project_target=config.project_target,
        hold_rate=config.hold_rate * config.learning_rate,
        hold_cap=config.hold_cap * config.learning_rate,
        update_metric=config.update_metric,
        project_rows=config.project_rows,
        measure_only=arm.measure_only,
        match=real if arm.match_real else None,
        refresh_every=config.vhack_refresh_every,
        refresh=lambda: processes.from_main(arm.make_basis(bases)),
    )


def grpo_config(config: TrainConfig, prompter: Prompter) -> GRPOConfig:
    rows = config.prompts_per_step * config.group_size
    at_once = config.micro_batch * processes.world_size()
    if rows % at_once:
        raise InputError(
            f"--micro-batch {config.micro_batch} x {processes.world_size()} processes does not divide the step's "
            f"{rows} rows (--prompts-per-step x --group-size); change one of them"
        )
    accumulation = rows // at_once
    own_rows = config.micro_batch * accumulation * config.steps_per_generation
    if config.vllm != "off" and own_rows % config.group_size:
        raise InputError(
            f"--vllm {config.vllm}: each of {processes.world_size()} processes has {own_rows} rows of a generation, no "
            f"whole groups of {config.group_size}; use fewer processes or another --prompts-per-step"
        )
    return GRPOConfig(
        output_dir=str(config.run_dir / "checkpoints"),
        seed=config.seed,
        loss_type="dr_grpo",
        scale_rewards="none",
        num_generations=config.group_size,
        per_device_train_batch_size=config.micro_batch,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation * config.steps_per_generation,
        num_iterations=config.num_iterations,
        max_steps=config.steps,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        top_p=config.top_p,
        learning_rate=config.learning_rate,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        beta=config.beta,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=config.dtype == "bfloat16",
        use_cpu=prompter.loaded.model.device.type == "cpu",
        chat_template_kwargs=prompter.template_kwargs,
        logging_steps=1,
        save_strategy="steps",
        save_steps=config.save_every,
        use_vllm=config.vllm != "off",
        vllm_mode="server" if config.vllm == "off" else config.vllm,
        vllm_gpu_memory_utilization=config.vllm_gpu_memory,
        vllm_enable_sleep_mode=config.vllm == "colocate" and config.offload,
        vllm_server_base_url=config.vllm_server,
        report_to=list(config.report_to),
        run_name=f"{config.preset}-{config.run_dir.name}",
        project="projected_grpo",
        disable_tqdm=True,
        log_level="warning",
    )


def _on_rollouts(config: TrainConfig, folder: Path, start_step: int) -> Callable[[list[dict]], None]:
    """What is done with each generation's labelled rollouts."""
    file = RolloutFile(folder / ROLLOUTS, start_step)
    if not config.report_to:
        return file
    tables = RolloutTables(config.report_to, folder / "tensorboard")

    def write(rows: list[dict]) -> None:
        file(rows)
        tables(rows)

    return write


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C, or the SIGTERM of a scheduler or a launcher, ends the run after the step in progress, with a checkpoint;
    a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, signum, frame) -> None:
        if self.stopped and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.stopped:
            logger.warning("interrupted: finishing this step, then saving a checkpoint (Ctrl-C again to stop at once)")
        self.stopped = True

    def on_step_end(self, args, state, control, **kwargs):
        if processes.anywhere(self.stopped):  # a signal that comes while it asks stays noted
            self.stopped = True
        if self.stopped:
            control.should_save = control.should_training_stop = True
        return control
