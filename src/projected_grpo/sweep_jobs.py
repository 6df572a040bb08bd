"""What the processes of a sweep do: the shared preparation, then a run each.

The module is light; torch and TRL are imported inside, so that the parent never pays for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from projected_grpo.config import EvalConfig, TrainConfig
from projected_grpo.run_state import state_of
from projected_grpo.sweep_file import basis_path

PRELOAD = ("projected_grpo.run", "projected_grpo.evaluate", __name__)
"""Imported once, before the processes are forked."""


@dataclass(frozen=True)
class RunTask:
    config: TrainConfig
    evaluation: EvalConfig
    threads: int

    @property
    def name(self) -> str:
        return f"{self.config.name} s{self.config.seed}"

    @property
    def log(self) -> Path:
        folder = self.config.run_dir
        return folder.parent / "logs" / f"{folder.name}.log"


@dataclass(frozen=True)
class PrepareTask:
    configs: tuple[TrainConfig, ...]
    """Of the runs that are not done."""
    to_train: tuple[TrainConfig, ...]
    log: Path
    threads: int
    name: str = "preparation"


def train_and_evaluate(task: RunTask) -> None:
    """The rest of one run, from wherever it stands: so a second try goes on and does not begin anew."""
    import torch

    from projected_grpo.evaluate import evaluate
    from projected_grpo.run import train

    torch.set_num_threads(task.threads)
    state = state_of(task.config, task.evaluation)
    if state in ("start", "resume"):
        train(replace(task.config, resume=state == "resume", overwrite=state == "start"))
    if state != "done":
        evaluate(task.evaluation)


def prepare(task: PrepareTask) -> None:
    """What the runs share, made once: pools that are missing, the caches of the model, the real bases."""
    import torch
    from loguru import logger
    from peft import get_peft_model

    from projected_grpo.adapter import DeltaSConfig
    from projected_grpo.basis import HackBasis, check_top_k
    from projected_grpo.errors import InputError
    from projected_grpo.extract import PairBases, describe, pairs_of
    from projected_grpo.micro.make import make_micro
    from projected_grpo.models import load_model, seed_of_micro
    from projected_grpo.prompting import Prompter

    torch.set_num_threads(task.threads)
    _pools(task.to_train, task.threads)
    models = dict.fromkeys((config.model, config.dtype, config.device) for config in task.configs)
    for name, dtype, device in models:
        if (seed := seed_of_micro(name)) is not None:
            make_micro(seed)
        loaded = load_model(name, dtype, device)
        model = get_peft_model(loaded.model, DeltaSConfig())
        of_model = [c for c in task.to_train if (c.model, c.dtype, c.device) == (name, dtype, device)]
        for path, config in {c.basis: c for c in of_model}.items():
            if path.is_file() or path != basis_path(config):
                try:
                    HackBasis.load(path).check_fits(model)
                    logger.info(f"basis {path} is there")
                    continue
                except InputError as error:
                    if path != basis_path(config):
                        raise
                    logger.warning(f"{error}: making it anew")
            check_top_k(config.v_hack_k, len(pairs_of(config)))
            basis = PairBases(model, Prompter(loaded), config).real()
            basis.save(path)
            logger.info("\n" + describe(basis))
            logger.info(f"wrote {path}")


def _pools(configs: Sequence[TrainConfig], workers: int) -> None:
    """Read every teacher pool, so that a bad one is refused now; build by rule one that is not there."""
    from projected_grpo.errors import saving_faults
    from projected_grpo.pool import build_pool, load_pool
    from projected_grpo.sources import problems_of, teacher_requests

    for path, config in {c.teacher_pool: c for c in configs if c.num_teacher}.items():
        problems = problems_of(config.problems)
        if path.is_file():
            load_pool(path, problems)
            continue
        requests = teacher_requests(config.problems, problems, config.modes)
        with saving_faults(path.with_suffix(".fault.txt")):
            build_pool(problems, requests, path, name=path.stem, workers=workers)
