"""The untrusted side: a template process that forks one fresh process for each completion.

Started as a script with a bare environment, never imported by the package: it depends on nothing but the standard
library and the files beside it, and the trainer's memory, environment and modules are not behind it. The template holds
no data but the setup codes of the problems: a job travels through file descriptors, and the expected values of a test
are never in a job. What can be imported is in `modules.py` and nothing else, so that labels do not depend on the host.
"""

import builtins
import contextlib
import fcntl
import gc
import json
import os
import random
import select
import signal
import socket
import stat
import struct
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import confine
import job as job_body
import modules
import wire  # noqa: F401

del sys.path[0]
for own in ("confine", "job", "modules", "wire"):
    del sys.modules[own]

MAX_FILE = 4096
"""Bytes of the watched file that go to the trusted side."""


class Template:
    def __init__(self, control, options):
        self.control, self.wall_limit = control, options["wall_seconds"]
        self.wall_patience = options["patience"] * self.wall_limit
        self.directory = options["directory"]
        confine.libc.prctl(confine.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.surroundings = confine.Surroundings(self.directory, options["uid"], options["rlimits"])
        self.setups, self.max_setups = {}, options["max_setups"]

    def serve(self):
        self.control.send(json.dumps({"isolation": self.surroundings.isolation}).encode())
        space = socket.CMSG_SPACE(5 * 4)
        while True:
            # Every page that this process writes to between two forks costs a fault: it does little, and that plainly.
            data, messages, _, _ = self.control.recvmsg(4096, space)
            if not data:
                return
            fds = struct.unpack(f"{len(messages[0][2]) // 4}i", messages[0][2])
            length, setup, file, new_setup = data.decode().split(" ")
            if new_setup == "1":
                *fds, setup_fd = fds
                self.learn(setup, setup_fd)
            module = self.setups[setup] if setup else None
            pid = self.surroundings.fork()
            if pid == 0:
                try:
                    job_body.main(fds, int(length), module, self.surroundings.confine)
                finally:
                    os._exit(70)
            for fd in fds:
                os.close(fd)
            exit_code, cpu, overstayed = self.wait(pid)
            left = f', "file": {json.dumps(self.read(file))}' if file else ""
            clean = self.surroundings.renew()
            end = f'{{"exit": {exit_code}, "cpu": {cpu:.6f}, "overstayed": {overstayed:d}, "clean": {clean:d}{left}}}'
            self.control.send(end.encode())

    def learn(self, key, fd):
        """Make the module of a setup code that defines things and does nothing else, once, for every fork.

        It comes apart from the job: what a completion says must not be left in the memory that the next one inherits.
        """
        if len(self.setups) >= self.max_setups:
            self.setups.clear()
        try:
            self.setups[key] = job_body.new_module(os.pread(fd, os.fstat(fd).st_size, 0).decode())
        except Exception:
            self.setups[key] = None  # the job runs it, and fails as it fails
        os.close(fd)
        gc.collect()
        gc.freeze()

    def wait(self, pid):
        """Wait for the job's process, kill it when it overstays or when the grader is gone, sweep what it left.

        Returns its exit code (negative: a signal), its CPU seconds and whether it overstayed.
        """
        start, overstayed = time.monotonic(), False
        deadline = start + self.wall_limit
        handle = os.pidfd_open(pid)
        while True:
            left = deadline - time.monotonic()
            ready = select.select([handle, self.control], [], [], max(0, left))[0]
            if handle in ready:
                break
            if self.control not in ready and self.starved(pid, time.monotonic() - start):
                deadline += self.wall_limit / 4
                continue
            overstayed = True
            os.kill(pid, signal.SIGKILL)
            break
        os.close(handle)
        _, status, usage = os.wait4(pid, 0)
        if not self.surroundings.alone:
            self.sweep(pid)
        return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, overstayed

    def starved(self, pid, elapsed):
        """Whether it waited for a processor most of the time, which a sleeper does not."""
        try:
            with open(f"/proc/{pid}/schedstat") as file:
                waited = int(file.read().split()[1]) / 1e9
        except (OSError, IndexError, ValueError):
            return False
        return elapsed < self.wall_patience and waited > elapsed / 2

    def sweep(self, pid):
        """Kill and reap everything that the job left behind: orphans come to this process, its subreaper."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        while True:
            try:
                done, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not done:
                for child in children():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
                select.select([], [], [], 0.001)

    def read(self, name):
        """The beginning of a file that the job wrote into its directory, as text; None where there is no such file."""
        try:
            fd = os.open(f"{self.directory}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            return os.pread(fd, MAX_FILE, 0).decode("utf-8", "replace")
        finally:
            os.close(fd)


def children():
    """Process ids whose parent is this process."""
    own = os.getpid()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            if parent == own:
                yield int(entry)


def site_exit(code=None):
    raise SystemExit(code)


def warm_up():
    """Run what every job runs, so that the interpreter has adapted this code to it before it is shared by forks."""
    code = "class Solution:\n    def f(self, xs):\n        return [sum(xs), str(xs), {1: xs}]\n"
    job = {"setup_code": "", "code": code, "dialogue": False}
    for _ in range(10):
        results = job_body.Results()
        job_body.run(job, [["f", [[1, 2]], {}]] * 10, None, results)
        results.flush()
    del sys.modules["solution"]


def main():
    control = socket.socket(fileno=fcntl.fcntl(int(sys.argv[1]), fcntl.F_DUPFD_CLOEXEC, 8))
    for fd in (0, 1, job_body.RESULTS, job_body.DIALOGUE):
        os.dup2(os.open("/dev/null", os.O_RDWR), fd)
    options = json.loads(sys.argv[2])
    names = modules.COMMON.split() + (modules.RARE.split() if options["all_modules"] else [])
    for name in [*names, *({"_pylong", "_pydatetime"} & sys.stdlib_module_names)]:
        __import__(name)
    template = Template(control, options)
    # What a completion must not see; emptied here once, and not in each of its processes.
    sys.path[:] = []
    sys.path_importer_cache.clear()
    sys.argv[:] = ["solution.py"]
    os.environ.clear()
    # What the module `site` would give, which -S leaves out.
    builtins.exit = builtins.quit = site_exit
    warm_up()
    random.seed(0)  # every completion finds the same state
    gc.collect()
    gc.freeze()
    template.serve()


if __name__ == "__main__":
    main()
