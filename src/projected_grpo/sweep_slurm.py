"""The processes of a sweep as jobs of a Slurm cluster, through submitit: one job a run.

The command that was typed stays in charge, as it does on one machine: it submits, at most so many at a time, tries a
failed run once more, and on Ctrl-C tells every job to finish its step and save. A job that Slurm is about to end,
because its time is up or another goes first, finishes its step, saves, is put back into the queue by submitit and goes
on from there. Whether a job has ended is asked of `squeue`, since submitit's own way needs an accounting database that
small clusters lack.
Left out on purpose: runs of several nodes.
"""

import os
import pickle
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from projected_grpo.errors import InputError
from projected_grpo.sweep_workers import Kind, LaunchError, Task, do

ASK_EVERY_S = 5.0
MOST_LIVES = 1000
"""How often a job may run out of time and be put back: a long run in short jobs is the ordinary case."""
NOTICE_S = 300
"""What Slurm gives a job before its time is up, to finish a step and save."""
GRACE_S = 10.0
"""Between a job's leaving the queue and its result's being there to read, on a slow file system."""


@dataclass(frozen=True)
class JobCall:
    """What a job does; submitit's `Checkpointable`."""

    job: Callable[[Any], None]
    task: Task

    def __call__(self) -> tuple[Kind, str]:
        """Until its end, or until Slurm says that the job's time is up or another goes first: then the run finishes its
        step and saves, as after a Ctrl-C, and the job goes back into the queue."""
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's
        warned = []

        def stop(signum: int, frame: Any) -> None:
            raise KeyboardInterrupt  # outside of training, which has a handler of its own

        def warn(signum: int, frame: Any) -> None:
            warned.append(signum)
            os.kill(os.getpid(), signal.SIGTERM)

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGUSR2, warn)
        outcome = do(self.job, self.task)
        if warned and outcome[0] == "interrupted" and callable(requeue):
            requeue(signal.SIGUSR2, None)  # does not come back
        return outcome

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
        if "time" not in self.parameters:
            raise InputError("--launcher slurm: give each job's time in minutes, --slurm time=240")
        try:
            from submitit import SlurmExecutor
        except ImportError:
            raise InputError("--launcher slurm needs submitit; install projected-grpo[slurm]") from None
        try:
            self._executor = SlurmExecutor(self.folder, max_num_timeout=MOST_LIVES)
            self._executor.update_parameters(
                **{"stderr_to_stdout": True, "signal_delay_s": NOTICE_S, **self.parameters}
            )
        except RuntimeError as error:
            raise InputError(f"--launcher slurm: {error}") from error
        except ValueError as error:
            raise InputError(f"--slurm: {' '.join(str(error).split())}") from error

    def start(self, task: Task) -> _Handle:
        from submitit.core.utils import FailedJobError

        self._executor.update_parameters(job_name=task.name.replace(" ", "_"))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # of sbatch too, which sits in the terminal's group
        try:
            handle = _Handle(self._executor.submit(JobCall(self.job, task)))
        except FailedJobError as error:
            raise LaunchError(" ".join(str(error).split())) from error
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
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
        """Out of the queue, and then some: a job that was put back has the result of its first life beside it."""
        if handle.slurm_job.job_id in self._in_queue:
            handle.gone_since = None
            return False
        if handle.slurm_job.paths.result_pickle.exists():
            return True
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
        job_id = handle.slurm_job.job_id
        subprocess.run(["scancel", "--state=PENDING", job_id], capture_output=True)
        subprocess.run(["scancel", "--signal=TERM", job_id], capture_output=True)

    def end(self, handle: _Handle) -> None:
        subprocess.run(["scancel", handle.slurm_job.job_id], capture_output=True)
