"""The processes of a sweep as jobs of a Slurm cluster, through submitit: one job a run.

The command that was typed stays in charge, as it does on one machine: it submits, at most so many at a time, tries a
failed run once more, and on Ctrl-C tells every job to finish its step and save. A job that Slurm is about to end,
because its time is up or another goes first, is put back into the queue by submitit and goes on from its last
checkpoint. Whether a job has ended is asked of `squeue`, since submitit's own way needs an accounting database that
small clusters lack.
Left out on purpose: runs of several nodes.
"""

import pickle
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from projected_grpo.errors import InputError
from projected_grpo.sweep_workers import Kind, Task, do

ASK_EVERY_S = 5.0
GRACE_S = 10.0
"""Between a job's leaving the queue and its result's being there to read, on a slow file system."""


@dataclass(frozen=True)
class JobCall:
    """What a job does; submitit's `Checkpointable`."""

    job: Callable[[Any], None]
    task: Task

    def __call__(self) -> tuple[Kind, str]:
        return do(self.job, self.task)

    def checkpoint(self) -> Any:
        """Before Slurm ends the job: the same call again, which goes on from the run's last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass
class _Handle:
    slurm_job: Any
    gone_since: float | None = None


@dataclass
class SlurmLauncher:
    """Submits with submitit's parameters of an sbatch file (`partition`, `time` in minutes, `gpus_per_node`, ...)."""

    job: Callable[[Any], None]
    folder: Path
    parameters: Mapping[str, Any]
    hears_ctrl_c: ClassVar[bool] = False
    _executor: Any = field(init=False)
    _in_queue: set[str] = field(init=False, default_factory=set)
    _asked: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        try:
            from submitit import SlurmExecutor
        except ImportError:
            raise InputError("--launcher slurm needs submitit; install projected-grpo[slurm]") from None
        try:
            self._executor = SlurmExecutor(self.folder)
            self._executor.update_parameters(stderr_to_stdout=True, **self.parameters)
        except RuntimeError as error:
            raise InputError(f"--launcher slurm: {error}") from error
        except ValueError as error:
            raise InputError(f"--slurm: {' '.join(str(error).split())}") from error

    def start(self, task: Task) -> _Handle:
        self._executor.update_parameters(job_name=task.name.replace(" ", "_"))
        handle = _Handle(self._executor.submit(JobCall(self.job, task)))
        self._in_queue.add(handle.slurm_job.job_id)
        return handle

    def wait(self, handles: Sequence[_Handle]) -> None:
        time.sleep(1.0)
        if time.monotonic() - self._asked < ASK_EVERY_S:
            return
        self._asked = time.monotonic()
        answer = subprocess.run(["squeue", "--noheader", "--format=%i", "--me"], capture_output=True, text=True)
        if answer.returncode == 0:  # else the controller is busy or away: what was true stays so until it answers
            self._in_queue = set(answer.stdout.split())

    def ended(self, handle: _Handle) -> bool:
        if handle.slurm_job.paths.result_pickle.exists():
            return True
        if handle.slurm_job.job_id in self._in_queue:
            handle.gone_since = None
            return False
        handle.gone_since = handle.gone_since or time.monotonic()
        return time.monotonic() - handle.gone_since > GRACE_S

    def said(self, handle: _Handle) -> tuple[Kind | None, str]:
        job = handle.slurm_job
        if not job.paths.result_pickle.exists():
            return None, f"Slurm job {job.job_id} was ended from outside ({job.paths.stdout})"
        with job.paths.result_pickle.open("rb") as file:
            how, result = pickle.load(file)
        return result if how == "success" else ("failed", str(result).strip().splitlines()[-1])

    def interrupt(self, handle: _Handle) -> None:
        subprocess.run(["scancel", "--signal=TERM", handle.slurm_job.job_id], capture_output=True)

    def end(self, handle: _Handle) -> None:
        subprocess.run(["scancel", handle.slurm_job.job_id], capture_output=True)
