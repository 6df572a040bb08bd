"""A sweep: many runs, each a process of its own on this machine, as many at once as it has cores, or a Slurm job.

A sweep can be stopped and given again: runs that are done are skipped, the others go on from where they stand. What
runs share (the teacher pool, the model's caches, the real basis for each set of pairs and settings) is made once,
before the first. Left out on purpose: more than one GPU of this machine.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from loguru import logger

from projected_grpo.config import TrainConfig
from projected_grpo.errors import InputError, RunFault, RunInterrupted
from projected_grpo.presets import preset_defaults
from projected_grpo.run_state import State, state_of
from projected_grpo.sweep_file import Sweep, basis_path
from projected_grpo.sweep_jobs import PRELOAD, PrepareTask, RunTask, prepare, train_and_evaluate
from projected_grpo.sweep_slurm import SlurmLauncher
from projected_grpo.sweep_watch import SweepWatch, format_table
from projected_grpo.sweep_workers import (
    Interrupts,
    Launcher,
    LocalLauncher,
    environment_of,
    process_context,
    run_all,
    warm_up,
)

NOT_SHOWN = {"seed", "label", "out_root", "arm", "grader_workers", "overwrite", "resume", "report_to"}


def sweep(
    plan: Sweep,
    jobs: int | None = None,
    dry_run: bool = False,
    again: str = "the same command",
    slurm: Mapping[str, Any] | None = None,
    job: Callable[[Any], None] = train_and_evaluate,
    preparation: Callable[[Any], None] = prepare,
    preload: Sequence[str] = PRELOAD,
) -> None:
    """Do what is left of the runs of `plan` and print the table.

    again: the line that goes on with it. slurm: submit to Slurm, with these parameters; None runs everything here.

    Raises:
        InputError: bad settings or files, or a folder with another run; no run was started.
        RunFault: a run failed twice; the others are done.
        RunInterrupted: Ctrl-C; every run that was going has a checkpoint.
    """
    on_cpu = all(config.device == "cpu" for config, _ in plan.runs)
    if slurm is None:
        cores = len(os.sched_getaffinity(0))
        jobs = jobs or (cores if on_cpu else 1)
        share = max(1, cores // jobs)  # however many runs are left, so that a run's numbers do not depend on it
    else:
        cores = share = int(slurm.get("cpus_per_task", 1))
        jobs = jobs or len(plan.runs)
    tasks = [_task(*run, _threads(share), share) for run in plan.runs]
    states = {task.name: state_of(task.config, task.evaluation) for task in tasks}
    if dry_run:
        print(format_plan(tasks, states, jobs))
        return
    to_do = [task for task in tasks if states[task.name] != "done"]
    if len(to_do) < len(tasks):
        logger.info(f"{len(tasks) - len(to_do)} of {len(tasks)} runs are done already")
    interrupts, outcomes = Interrupts(), {}
    if to_do:
        to_train = tuple(task.config for task in to_do if states[task.name] != "evaluate")
        log = plan.folder / "logs" / "preparation.log"
        shared = PrepareTask(tuple(task.config for task in to_do), to_train, log, _threads(cores))
        with interrupts.listening(), environment_of(share), SweepWatch(tasks, states, interrupts) as watch:
            launch: Callable[[Callable], Launcher]
            if slurm is None:
                context = process_context(on_cpu, preload)
                warm_up(context, interrupts)
                launch = partial(LocalLauncher, context=context)
            else:
                launch = partial(SlurmLauncher, folder=log.parent / "slurm", parameters=slurm)
            _prepare(shared, launch(preparation), interrupts, again)
            logger.info(f"{len(to_do)} runs, {jobs} at a time, {_threads(share)} threads each; logs in {log.parent}")
            outcomes = run_all(to_do, launch(job), interrupts, jobs, watcher=watch)
    logger.info("\n" + format_table(tasks, states, outcomes))
    finished = len(tasks) - len(to_do) + sum(outcome.kind == "ok" for outcome in outcomes.values())
    if interrupts.count and finished < len(tasks):
        raise RunInterrupted(f"interrupted with {finished} of {len(tasks)} runs done; go on with {again}")
    failed = [task for task in to_do if task.name not in outcomes or outcomes[task.name].kind != "ok"]
    if failed:
        first = failed[0]
        raise RunFault(
            f"{len(failed)} of {len(tasks)} runs failed: {', '.join(task.name for task in failed)}; the first with "
            f"{outcomes[first.name].message!r}, see {first.log}; then {again} tries them again"
        )
    logger.info(f"next: projected-grpo report {plan.folder}")


def _threads(otherwise: int) -> int:
    """What the user has set, in the variable that torch goes by too."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else otherwise


def _task(config: TrainConfig, evaluation: Any, threads: int, graders: int) -> RunTask:
    config = config if config.grader_workers is not None else replace(config, grader_workers=graders)
    if evaluation.grader_workers is None:
        evaluation = replace(evaluation, grader_workers=config.grader_workers)
    return RunTask(config, evaluation, threads)


def _prepare(task: PrepareTask, launcher: Launcher, interrupts: Interrupts, again: str) -> None:
    bases = len({config.basis for config in task.to_train})
    logger.info(f"preparing what the runs share: imports, the model, {bases} bases, teacher pools ({task.log})")
    began = time.monotonic()
    outcome = run_all([task], launcher, interrupts, attempts=1).get(task.name)
    if interrupts.count or outcome is None:
        raise RunInterrupted(f"interrupted before the first run; go on with {again}")
    if outcome.kind == "refused":
        raise InputError(outcome.message)
    if outcome.kind != "ok":
        raise RunFault(f"the preparation failed, no run was started: {outcome.message}; see {task.log}")
    logger.info(f"prepared in {time.monotonic() - began:.0f} s")


def format_plan(tasks: list[RunTask], states: dict[str, State], jobs: int) -> str:
    """Each run, what would be done with it, and the settings in which it departs from its preset."""
    width = max(len(task.name) for task in tasks) + 2
    preset = tasks[0].config.preset
    lines = [f"{len(tasks)} runs of preset {preset} in {tasks[0].config.run_dir.parent}, {jobs} at a time"]
    lines += [f"{task.name:<{width}}{states[task.name]:<10}{_departs(task.config)}".rstrip() for task in tasks]
    return "\n".join(lines)


def _departs(config: TrainConfig) -> str:
    shown: dict[str, Any] = {"arm": config.arm} if config.label is not None else {}
    for name, usual in vars(preset_defaults(config.preset)).items():
        value = getattr(config, name)
        if name not in NOT_SHOWN and value != usual and not (name == "basis" and value == basis_path(config)):
            shown[name] = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return "  ".join(f"{name}={value}" for name, value in shown.items())
