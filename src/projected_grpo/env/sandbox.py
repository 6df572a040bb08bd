"""One sandbox: a warm template process (`worker.py`) that runs one job at a time, each in a fresh process.

The trusted end of the wire. A job goes in as JSON through an anonymous file, lines of plain data come out of a pipe of
their own, and the template reports how the process ended after the job's whole process group is killed and reaped.
The template is started with exec, not forked from here, so a trainer with threads and a GPU can use it.

What it does not protect against: a hole in the kernel, side channels, filling the temporary disk up to
`file_bytes` times the number of files; and, on a kernel without user namespaces where the grader is not root
(`isolation` says so), reading what the user can read, using the network and signalling the user's own processes.
"""

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from projected_grpo.env import plain
from projected_grpo.errors import RunFault

WORKER = Path(__file__).with_name("worker.py")
FIRST_UID = 61_000
"""Where the grader is root, slot i runs its jobs as user FIRST_UID + i, which owns nothing else."""
GRACE = 30.0
"""Seconds past the wall limit after which the template itself, which enforces that limit, is taken for dead."""


@dataclass(frozen=True)
class Limits:
    """What one job may use."""

    cpu_seconds: float = 10.0
    """CPU time for all tests of a completion together; the kernel kills at the next whole second."""
    wall_seconds: float = 60.0
    """For sleepers only: the verdict depends on CPU time, so that load does not change labels."""
    memory_bytes: int = 1 << 30
    """Address space of each process."""
    processes: int = 64
    """Processes and threads, where the kernel counts them apart from the trainer's (never for root itself)."""
    file_bytes: int = 16 << 20
    open_files: int = 64
    message_bytes: int = 4 << 20
    """What a job may write to its channel before it is cut off: parsed, it may take fifty times as much memory here."""

    def rlimits(self) -> dict[str, int]:
        cpu = max(1, int(-(-self.cpu_seconds // 1)))
        return {
            "RLIMIT_CPU": cpu,
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True)
class Outcome:
    """What a job left: its messages (parsed JSON, not yet believed) and how its process ended."""

    messages: list[Any] = field(default_factory=list)
    garbled: bool = False
    """Something on the channel was no JSON line: nobody but the completion writes that."""
    cut_off: bool = False
    exit_code: int = 0
    """As in subprocess: negative is the signal that ended it."""
    cpu_seconds: float = 0.0
    overstayed: bool = False
    """The wall limit ended it."""


class TemplateDied(Exception):
    """The template process is gone; whether the job or the machine did it, the caller decides."""


class Sandbox:
    """One slot of the pool. Not thread-safe: one thread, one sandbox. `close` when done."""

    def __init__(self, slot: int, limits: Limits) -> None:
        """Begin to start the template; call `await_start` before the first `run`."""
        self.slot, self.limits = slot, limits
        self.root = Path(tempfile.mkdtemp(prefix="projected-grpo-sandbox-"))
        self.root.chmod(0o711)
        self.start()

    def start(self) -> None:
        """Begin to start the template; `await_start` ends it, so that a pool starts its templates side by side."""
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the template
        # -P -s -S and a bare environment instead of -I, which would ignore the fixed hash seed.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-B", str(WORKER), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.stderr,
            start_new_session=True,
        )
        theirs.close()

    def await_start(self) -> None:
        """Raises RunFault with the template's last words where it did not come up."""
        self.control.settimeout(60)
        try:
            hello = self._receive()
        except TemplateDied:
            self.process.wait()
            self.stderr.seek(0)
            last = self.stderr.read().decode("utf-8", "replace").strip().splitlines()[-1:]
            raise RunFault(f"the grader's template process did not start: {' '.join(last)}") from None
        self.isolation: tuple[str, ...] = tuple(hello["isolation"])

    @property
    def contained(self) -> bool:
        """Whether a job can reach no process but its own, so that a dead template is not the job's doing."""
        return "process namespace" in self.isolation or "own user" in self.isolation

    def run(self, job: dict[str, Any]) -> Outcome:
        """Run one job in a fresh process and empty directory. Raises TemplateDied, RunFault."""
        directory = self._fresh_directory()
        job_fd = os.memfd_create("job")
        read_fd, write_fd = os.pipe()
        root_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.write(job_fd, json.dumps(job, separators=(",", ":")).encode())
            os.lseek(job_fd, 0, os.SEEK_SET)
            request = {
                "rlimits": self.limits.rlimits(),
                "wall_limit": self.limits.wall_seconds,
                "uid": FIRST_UID + self.slot,
            }
            try:
                socket.send_fds(self.control, [json.dumps(request).encode()], [job_fd, write_fd, root_fd])
            except OSError:
                raise TemplateDied from None
            os.close(write_fd)
            write_fd = -1
            deadline = time.monotonic() + self.limits.wall_seconds + GRACE
            data, cut_off = self._read(read_fd, deadline)
            os.close(read_fd)
            read_fd = -1
            self.control.settimeout(max(1.0, deadline - time.monotonic()))
            end = self._receive()
        finally:
            for fd in (job_fd, root_fd, read_fd, write_fd):
                if fd >= 0:
                    os.close(fd)
            self._remove(directory)
        messages, garbled = parse_messages(data)
        return Outcome(messages, garbled, cut_off, end["exit"], end["cpu"], end["overstayed"])

    def _read(self, fd: int, deadline: float) -> tuple[bytes, bool]:
        chunks, size = [], 0
        while size <= self.limits.message_bytes:
            ready = select.select([fd, self.control], [], [], max(0.0, deadline - time.monotonic()))[0]
            if fd not in ready:
                if not ready:
                    raise RunFault("the grader's template process does not answer")
                break  # the job is over, or the template is: `_receive` says which
            chunk = os.read(fd, 1 << 16)
            if not chunk:
                break
            chunks.append(chunk)
            size += len(chunk)
        return b"".join(chunks), size > self.limits.message_bytes

    def _receive(self) -> dict[str, Any]:
        try:
            data = self.control.recv(1 << 16)
        except TimeoutError:
            raise RunFault("the grader's template process does not answer") from None
        except OSError:
            data = b""
        if not data:
            raise TemplateDied
        return json.loads(data)

    def _fresh_directory(self) -> Path:
        directory = self.root / "job"
        directory.mkdir(mode=0o700)
        if os.getuid() == 0:
            os.chown(directory, FIRST_UID + self.slot, FIRST_UID + self.slot)
        return directory

    def _remove(self, directory: Path) -> None:
        try:
            directory.rmdir()  # nearly always empty
        except OSError:
            # Not shutil.rmtree: a completion may nest directories deeper than Python recurses, or lock them.
            subprocess.run(["chmod", "-R", "u+rwx", str(directory)], stderr=subprocess.DEVNULL)
            subprocess.run(["rm", "-rf", str(directory)], stderr=subprocess.DEVNULL)

    def restart(self) -> None:
        """Replace a template that died. Raises RunFault."""
        self._stop()
        self.start()
        self.await_start()

    def _stop(self) -> None:
        self.control.close()
        self.stderr.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        self._stop()
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.root)


def parse_messages(data: bytes) -> tuple[list[Any], bool]:
    """Whole lines of the channel -> JSON values; and whether a line was none (an unfinished last line is not)."""
    *lines, _unfinished = data.split(b"\n")
    messages = []
    for line in lines:
        try:
            messages.append(plain.loads(line))
        except (ValueError, RecursionError):
            return messages, True
    return messages, False
