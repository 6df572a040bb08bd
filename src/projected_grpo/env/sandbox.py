"""One sandbox: a warm template process (`untrusted/template.py`) that runs one job at a time, each in a fresh process.

The trusted end of the wire. A job goes in as JSON through a file in memory, lines of plain data come out in another,
and the template reports how the process ended after the job's whole process group is killed and reaped.
The template is started with exec, not forked from here, so a trainer with threads and a GPU can use it.

What it does not protect against: docs/grader.md says it.
"""

import contextlib
import json
import marshal
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from projected_grpo.errors import RunFault

TEMPLATE = Path(__file__).parent / "untrusted" / "template.py"
FIRST_UID = 61_000
"""Where the grader is root, slot i runs its jobs as user FIRST_UID + i, which owns nothing else."""
MAX_SETUPS = 16
"""Setup codes that a template keeps ready."""
GRACE = 30.0
"""Seconds past the last wall limit after which the template itself, which enforces that limit, is taken for dead."""
PATIENCE = 5
"""How many times the wall limit a job may take that is not asleep but starved by the machine's load."""


@dataclass(frozen=True)
class Limits:
    """What one job may use."""

    cpu_seconds: float = 10.0
    """CPU time for all tests of a completion together; the kernel kills at the next whole second."""
    wall_seconds: float = 60.0
    """For sleepers only: the verdict depends on CPU time, so that load does not change labels. A job that gets on, on a
    machine that is too busy, is let past it, up to PATIENCE times."""
    memory_bytes: int = 1 << 30
    """Address space of each process."""
    processes: int = 64
    """Processes and threads, where the kernel counts them apart from the trainer's (never for root itself)."""
    file_bytes: int = 16 << 20
    open_files: int = 64
    message_bytes: int = 4 << 20
    """What a job's results may hold: parsed, they may take fifty times as much memory here."""

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
class Job:
    """What one process does: load `code` and make `calls`, or what `ask` puts in their place."""

    code: str
    calls: Sequence[Any] = ()
    """As `Oracle.calls` has them."""
    talk: Callable[["Channel"], bool] | None = None
    """Makes further calls while the job runs, and says whether what came back is right; raises Ended."""
    setup_code: str = ""
    setup_key: str | None = None
    """Where the setup code does nothing but define things: its name, under which the template keeps it ready."""
    ask: tuple[tuple[str, Any], ...] = ()
    """`test_func_name`: run that function instead; `asks`: let opaque results say what they are equal to."""
    attribute: str | None = None
    """An attribute of the solution that is asked for after the calls."""
    output: bool = False
    """Whether its standard output comes back; otherwise nobody keeps it."""
    file: str | None = None
    """A file of its directory that comes back."""
    all_modules: bool = False
    """Whether it may import more than `untrusted/modules.py` calls common."""

    def encode(self) -> bytes:
        """For this very interpreter on the other side, which reads it and sends nothing back in this form."""
        job = {"code": self.code, "setup_code": self.setup_code, "attribute": self.attribute, **dict(self.ask)}
        job |= {"dialogue": self.talk is not None, "output": self.output, "file": self.file is not None}
        return marshal.dumps((job, list(self.calls)))


@dataclass(frozen=True)
class Outcome:
    """What a job left, none of it believed yet, and how its process ended."""

    data: bytes = b""
    """Its results: lines of JSON, if it is the worker's own code that wrote them."""
    cut_off: bool = False
    output: bytes = b""
    file: str | None = None
    exit_code: int = 0
    """As in subprocess: negative is the signal that ended it."""
    cpu_seconds: float = 0.0
    overstayed: bool = False
    """The wall limit ended it."""
    talk_held: bool = True
    """Whether all tests of the dialogue held."""
    talk_broken: bool = False
    """The dialogue ended before its tests did."""


class Ended(Exception):
    """The untrusted side of a dialogue is gone, or says what it should not: there are no more answers."""


class TemplateDied(Exception):
    """The template process is gone; whether the job or the machine did it, the caller decides."""


class _Template:
    """A running template process and the socket to it."""

    def __init__(self, options: dict[str, Any]) -> None:
        """Begin to start it; `await_start` ends that, so that a pool starts its templates side by side."""
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the template
        # -P -s -S and a bare environment instead of -I, which would ignore the fixed hash seed.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-B", str(TEMPLATE), str(theirs.fileno()), json.dumps(options)],
            pass_fds=[theirs.fileno()],
            env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.stderr,
            start_new_session=True,
        )
        theirs.close()
        self.setups: set[str] = set()

    def await_start(self) -> tuple[str, ...]:
        """What isolation it has. Raises RunFault with the template's last words where it did not come up."""
        try:
            return tuple(self.receive(60)["isolation"])
        except TemplateDied:
            self.process.wait()
            self.stderr.seek(0)
            last = self.stderr.read().decode("utf-8", "replace").strip().splitlines()[-1:]
            raise RunFault(f"the grader's template process did not start: {' '.join(last)}") from None

    def is_new(self, setup_key: str) -> bool:
        """Whether this setup code is new to it, which it is no more then. The template forgets by the same rule."""
        if setup_key in self.setups:
            return False
        if len(self.setups) >= MAX_SETUPS:
            self.setups.clear()
        self.setups.add(setup_key)
        return True

    def send(self, request: str, fds: list[int]) -> None:
        try:
            socket.send_fds(self.control, [request.encode()], fds)
        except OSError:
            raise TemplateDied from None

    def receive(self, seconds: float) -> dict[str, Any]:
        self.control.settimeout(seconds)
        try:
            data = self.control.recv(1 << 16)
        except TimeoutError:
            raise RunFault("the grader's template process does not answer") from None
        except OSError:
            data = b""
        if not data:
            raise TemplateDied
        return json.loads(data)

    def stop(self) -> None:
        self.control.close()
        self.stderr.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Channel:
    """The trusted end of a dialogue with a running job: lines out, lines in, until the job or the dialogue ends."""

    def __init__(self, ours: socket.socket, control: socket.socket, limit: int, patience: float) -> None:
        """`limit`: bytes that may come in. `patience`: seconds after which the template is taken for dead."""
        self.socket, self.control, self.left, self.patience = ours, control, limit, patience
        self.socket.settimeout(patience)
        self.rest, self.broken = bytearray(), False

    def run(self, talk: Callable[["Channel"], bool]) -> bool:
        """What `talk` says; False where the job ended first, or says more than it was asked."""
        try:
            held = talk(self)
        except Ended:
            self.broken = True
            return False
        finally:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
        return held and not self.rest

    def send_line(self, line: bytes) -> None:
        try:
            self.socket.sendall(line)
        except OSError:
            raise Ended from None

    def read_line(self) -> bytes:
        end = self.rest.find(b"\n")
        while end < 0:
            ready = select.select([self.socket, self.control], [], [], self.patience)[0]
            if not ready:
                raise RunFault("the grader's template process does not answer")
            more = self.socket.recv(1 << 16) if self.socket in ready else b""
            self.left -= len(more)
            if not more or self.left < 0:
                raise Ended  # the job is over, or the template is: `receive` says which
            found = more.find(b"\n")
            end = len(self.rest) + found if found >= 0 else -1
            self.rest += more
        line = bytes(self.rest[:end])
        del self.rest[: end + 1]
        return line

    def close(self) -> None:
        self.socket.close()


class Sandbox:
    """One slot of the pool. Not thread-safe: one thread, one sandbox. `close` when done."""

    def __init__(self, slot: int, limits: Limits) -> None:
        """Begin to start the template; call `await_start` before the first `run`."""
        self.slot, self.limits = slot, limits
        self.root = Path(tempfile.mkdtemp(prefix="projected-grpo-sandbox-"))
        self.root.chmod(0o711)
        self.directory = self.root / "job"
        self._fresh_directory()
        self._templates = {False: self._new_template(False)}
        """By whether it has all modules; that one is started when it is first wanted."""

    def _new_template(self, all_modules: bool) -> _Template:
        options = {
            "all_modules": all_modules,
            "directory": str(self.directory),
            "uid": FIRST_UID + self.slot,
            "rlimits": self.limits.rlimits(),
            "wall_seconds": self.limits.wall_seconds,
            "patience": PATIENCE,
            "max_setups": MAX_SETUPS,
        }
        return _Template(options)

    def await_start(self) -> None:
        """Raises RunFault where the template did not come up."""
        self.isolation = self._templates[False].await_start()

    @property
    def pids(self) -> list[int]:
        """Of the template processes."""
        return [template.process.pid for template in self._templates.values()]

    @property
    def contained(self) -> bool:
        """Whether a job can reach no process but its own, so that a dead template is not the job's doing."""
        return bool({"process namespace", "own user", "system call filter"} & set(self.isolation))

    def run(self, job: Job) -> Outcome:
        """Run one job in a fresh process and empty directory. Raises TemplateDied, RunFault."""
        template = self._templates.get(job.all_modules)
        if template is None:
            template = self._templates[job.all_modules] = self._new_template(job.all_modules)
            template.await_start()
        fds = [os.memfd_create("job"), os.memfd_create("results")]
        patience = PATIENCE * self.limits.wall_seconds + GRACE
        channel = None
        if job.talk is not None:
            ours, theirs = socket.socketpair()
            fds.append(theirs.detach())
            channel = Channel(ours, template.control, self.limits.message_bytes, patience)
        if job.output:
            fds.append(os.memfd_create("output"))
        held = True
        try:
            encoded = job.encode()
            data = memoryview(encoded)
            while data:
                data = data[os.write(fds[0], data) :]
            new_setup = job.setup_key is not None and template.is_new(job.setup_key)
            if new_setup:
                setup = os.memfd_create("setup")
                os.write(setup, job.setup_code.encode())
                fds.append(setup)
            template.send(f"{len(encoded)} {job.setup_key or ''} {job.file or ''} {new_setup:d}", fds)
            if new_setup:
                os.close(fds.pop())
            if channel is not None and job.talk is not None:
                os.close(fds.pop(2))
                held = channel.run(job.talk)
            end = template.receive(patience)
            if not end["clean"]:
                self._remove()
                self._fresh_directory()
            results, cut_off = _read(fds[1], self.limits.message_bytes)
            output = _read(fds[-1], self.limits.file_bytes)[0] if job.output else b""
        finally:
            if channel is not None:
                channel.close()
            for fd in fds:
                os.close(fd)
        broken = channel is not None and channel.broken
        overstayed = bool(end["overstayed"])
        return Outcome(results, cut_off, output, end.get("file"), end["exit"], end["cpu"], overstayed, held, broken)

    def _fresh_directory(self) -> None:
        self.directory.mkdir(mode=0o700, exist_ok=True)
        if os.getuid() == 0:
            os.chown(self.directory, FIRST_UID + self.slot, FIRST_UID + self.slot)

    def _remove(self) -> None:
        try:
            self.directory.rmdir()
        except OSError:
            self.root.chmod(0o711)
            # Not shutil.rmtree: a completion may nest directories deeper than Python recurses, or lock them.
            subprocess.run(["chmod", "-R", "u+rwx", str(self.directory)], stderr=subprocess.DEVNULL)
            subprocess.run(["rm", "-rf", str(self.directory)], stderr=subprocess.DEVNULL)

    def restart(self) -> None:
        """Replace templates, one of which died. Raises RunFault."""
        self._stop()
        self._fresh_directory()
        self._templates = {False: self._new_template(False)}
        self.await_start()

    def _stop(self) -> None:
        for template in self._templates.values():
            template.stop()
        self._remove()

    def close(self) -> None:
        self._stop()
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.root)


def _read(fd: int, limit: int) -> tuple[bytes, bool]:
    """At most `limit` bytes of a file in memory, and whether it holds more."""
    size = os.fstat(fd).st_size
    return os.pread(fd, min(size, limit), 0), size > limit
