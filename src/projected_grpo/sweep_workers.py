"""Tasks through processes of their own, so many at a time: a crash, an OOM kill or a leak in one stops nothing else.

On the CPU the processes are forked from one server that has imported what they need; where a GPU may be used each is
started afresh, since a library that has asked for a GPU at import cannot be forked. A failed task is tried once more.
Ctrl-C reaches the children by itself (one process group): no new task is started and the rest is waited for; a second
one ends them.
"""

import multiprocessing as mp
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from projected_grpo.errors import InputError, RunInterrupted

TICK_S = 1.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
}
"""glibc keeps what a step frees for the next one, in place of a page fault for every page of it: 5 % of a small run's
CPU time for 8 % more resident memory (docs/performance.md)."""


class Task(Protocol):
    """Anything that can be pickled, with a name for the reader and a file for what its process writes."""

    @property
    def name(self) -> str: ...
    @property
    def log(self) -> Path: ...


Kind = Literal["ok", "refused", "failed", "interrupted"]
"""`refused`: an InputError, whose line is the message."""


@dataclass(frozen=True)
class Outcome:
    kind: Kind
    message: str
    seconds: float
    attempts: int


@dataclass
class Running:
    task: Any
    attempt: int
    started: float
    handle: Any
    """The launcher's own."""


class LaunchError(Exception):
    """A task could not be started now: too many are going, or whoever starts them is busy."""


class Launcher(Protocol):
    """Where the processes of a sweep run."""

    hears_ctrl_c: ClassVar[bool]
    """Its processes are in the terminal's group and get a Ctrl-C themselves."""

    def start(self, task: Task) -> Any:
        """Begin a task; the handle to ask for it by. Raises LaunchError."""

    def wait(self, handles: Sequence[Any]) -> None:
        """Until one may have ended, or a moment has passed."""

    def ended(self, handle: Any) -> bool: ...

    def said(self, handle: Any) -> tuple[Kind | None, str]:
        """What an ended process said last, None for one that could not, and how it ended."""

    def interrupt(self, handle: Any) -> None:
        """To be finished as after a Ctrl-C."""

    def end(self, handle: Any) -> None:
        """At once."""


class Watcher:
    """Told of what goes on; does nothing here."""

    def started(self, running: Running) -> None: ...
    def not_started(self, task: Any, why: str) -> None: ...
    def ended(self, task: Any, outcome: Outcome) -> None: ...
    def retried(self, task: Any, outcome: Outcome) -> None: ...
    def tick(self, running: Sequence[Running]) -> None: ...


class Interrupts:
    """Counts Ctrl-C, and SIGTERM with it, while it listens."""

    count = 0
    by_sigterm = False
    """It comes to this process alone, Ctrl-C to the terminal's whole group."""
    taken = 0

    @contextmanager
    def listening(self) -> Iterator["Interrupts"]:
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, signum, frame) -> None:
        self.count += 1
        self.by_sigterm = signum == signal.SIGTERM

    def take(self) -> bool:
        """Whether there is one that was not taken yet."""
        new, self.taken = self.count > self.taken, self.count
        return new


@contextmanager
def environment_of(threads: int) -> Iterator[None]:
    """Number of threads and allocator, for the processes started inside; what the user has set stays."""
    wanted = dict.fromkeys(THREAD_VARIABLES, str(threads)) | ALLOCATOR | {"TOKENIZERS_PARALLELISM": "false"}
    before = {name: os.environ.get(name) for name in wanted}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def process_context(on_cpu: bool, preload: Sequence[str]) -> Any:
    """Where the processes come from."""
    if not on_cpu:
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def warm_up(context: Any, interrupts: Interrupts) -> None:
    """The server's imports take 10 to 20 s; a Ctrl-C need not wait for their end."""
    if context.get_start_method() != "forkserver":
        return

    def first() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # of this thread, and so of the server
        process = context.Process(target=_nothing)
        process.start()
        process.join()

    resource_tracker.ensure_running()
    thread = threading.Thread(target=first, daemon=True)
    thread.start()
    while thread.is_alive() and not interrupts.count:
        thread.join(0.2)


def _nothing() -> None:
    pass


def run_all(
    tasks: Sequence[Task],
    launcher: Launcher,
    interrupts: Interrupts,
    jobs: int = 1,
    attempts: int = 2,
    watcher: Watcher | None = None,
) -> dict[str, Outcome]:
    """Do every task, `jobs` at a time; what became of each by its name. A task never begun is not in it."""
    watcher = watcher or Watcher()
    waiting = deque((task, 1) for task in tasks)
    running: list[Running] = []
    outcomes: dict[str, Outcome] = {}
    spent: dict[str, float] = {}
    try:
        while (waiting and not interrupts.count) or running:
            while waiting and len(running) < jobs and not interrupts.count:
                task, attempt = waiting.popleft()
                started = time.monotonic()
                try:
                    running.append(Running(task, attempt, started, launcher.start(task)))
                except LaunchError as error:
                    if running:  # fewer at a time then
                        jobs = len(running)
                        waiting.appendleft((task, attempt))
                    else:
                        outcomes[task.name] = Outcome("failed", str(error), 0.0, attempt)
                    watcher.not_started(task, str(error))
                    continue
                watcher.started(running[-1])
            launcher.wait([each.handle for each in running])
            if interrupts.take() and (interrupts.by_sigterm or not launcher.hears_ctrl_c):
                for each in running:
                    launcher.interrupt(each.handle)
            if interrupts.count > 1:
                for each in running:
                    launcher.end(each.handle)
            for ended in [each for each in running if launcher.ended(each.handle)]:
                running.remove(ended)
                spent[ended.task.name] = spent.get(ended.task.name, 0.0) + time.monotonic() - ended.started
                outcome = _outcome(ended, *launcher.said(ended.handle), spent[ended.task.name], interrupts.count > 0)
                if outcome.kind in ("failed", "refused") and ended.attempt < attempts and not interrupts.count:
                    waiting.appendleft((ended.task, ended.attempt + 1))
                    watcher.retried(ended.task, outcome)
                else:
                    outcomes[ended.task.name] = outcome
                    watcher.ended(ended.task, outcome)
            watcher.tick(running)
    finally:
        for each in running:
            launcher.end(each.handle)
    return outcomes


def _outcome(ended: Running, kind: Kind | None, message: str, seconds: float, interrupted: bool) -> Outcome:
    if kind is None:
        kind = "interrupted" if interrupted else "failed"
    elif kind == "interrupted" and not interrupted:
        kind = "failed"  # somebody has stopped this one process
    return Outcome(kind, message, seconds, ended.attempt)


@dataclass(frozen=True)
class LocalLauncher:
    """Processes of this machine, from `process_context`, that do `job` on a task."""

    job: Callable[[Any], None]
    context: Any
    hears_ctrl_c: ClassVar[bool] = True

    def start(self, task: Task) -> tuple[Any, connection.Connection]:
        """It, and the server it is forked from, hold Ctrl-C back until the job's own code is there."""
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_child, args=(self.job, task, sender), name=task.name)
        resource_tracker.ensure_running()  # its start would let Ctrl-C through again
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        sender.close()
        return process, receiver

    def wait(self, handles: Sequence[Any]) -> None:
        connection.wait([process.sentinel for process, _ in handles], timeout=TICK_S)

    def ended(self, handle: Any) -> bool:
        process, _ = handle
        return not process.is_alive()

    def said(self, handle: Any) -> tuple[Kind | None, str]:
        process, receiver = handle
        process.join()
        code = process.exitcode
        try:
            if receiver.poll():
                return receiver.recv()
        except EOFError:
            pass
        finally:
            receiver.close()
        return None, f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"

    def interrupt(self, handle: Any) -> None:
        process, _ = handle
        os.kill(process.pid, signal.SIGTERM)  # a second one, by whoever ends the whole group, does no harm

    def end(self, handle: Any) -> None:
        process, _ = handle
        process.kill()  # a run takes SIGTERM as it takes Ctrl-C; its files are whole whenever it ends
        process.join()


def _child(job: Callable[[Any], None], task: Task, sender: connection.Connection) -> None:
    sender.send(do(job, task))


def do(job: Callable[[Any], None], task: Task) -> tuple[Kind, str]:
    """The job in a process of its own: what it says goes to the task's log, how it ended is returned."""
    write_to(task.log)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        from projected_grpo.cli_options import console

        console()
        job(task)
    except (KeyboardInterrupt, RunInterrupted) as stopped:
        print(f"interrupted: {stopped}", file=sys.stderr)
        return "interrupted", str(stopped)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return "refused", str(error)
    except SystemExit:  # the way in which a job leaves that goes back into a queue
        raise
    except BaseException as error:
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        return "failed", f"{type(error).__name__}: {first}"
    return "ok", ""


def write_to(path: Path) -> None:
    """Standard output and error, of this process and all that it starts, at the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(handle, number)
    os.close(handle)
