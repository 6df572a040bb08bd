"""The untrusted side: a template process that forks one fresh process for each completion.

Started as a script with a bare environment, never imported by the package: it depends on nothing but the
standard library, and the trainer's memory, environment and modules are not behind it. The template holds no data: a job
travels through file descriptors that only its own process reads. The expected values of a test are never in a job.

A job's process computes and writes plain data (see `plain.py`) to its channel, one JSON line per message:
["done", index, value, [watched arguments afterwards]] | ["failed", text] | ["passed"].
Whatever it writes is data to be compared, or, for a loophole, the word that the flawed grader believes.

Isolation, as far as the kernel allows it and as `hello` reports it: a user of its own (where the grader is root), an
empty root directory, namespaces for processes, network and IPC, resource limits, no new privileges. In every case
exactly the modules below can be imported, so that labels do not depend on the host.
"""

import collections
import contextlib
import ctypes
import fcntl
import gc
import json
import os
import random
import resource
import select
import signal
import socket
import sys
import time
import types

MODULES = """
abc array ast base64 binascii bisect calendar cmath collections collections.abc contextlib copy csv ctypes dataclasses
datetime decimal difflib enum fractions functools gc graphlib hashlib heapq html inspect io itertools json keyword
linecache locale logging math multiprocessing numbers operator os os.path pathlib pprint queue random re resource select
secrets shutil signal socket statistics string struct subprocess sys tempfile textwrap threading time timeit tokenize
traceback types typing unicodedata unittest unittest.mock uuid warnings weakref zlib zoneinfo concurrent.futures
concurrent.futures.thread encodings.idna encodings.ascii encodings.latin_1 encodings.utf_16 encodings.unicode_escape
importlib importlib.util asyncio platform argparse getpass pickle doctest encodings.utf_8_sig encodings.utf_32
encodings.punycode encodings.cp1252 concurrent.futures.process multiprocessing.pool reprlib errno stat sched codecs
__future__ _strptime _pydecimal
"""

CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE = 1, 38, 36, 4
MAX_DEPTH = 200
MAX_ITEMS = 2_000_000

libc = ctypes.CDLL(None, use_errno=True)


# --- plain data, the mirror image of plain.py ---------------------------------------------------------------------


class Encoder:
    """Python value -> wire value; what is no plain data of an exact built-in type becomes {"opaque": its type}."""

    def __init__(self):
        self.items = 0

    def encode(self, value, depth=0):
        self.items += 1
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if value.bit_length() < 10_000 else {"int": hex(value)}
        if kind is float:
            return value if value - value == 0 else {"float": repr(value)}
        if depth > MAX_DEPTH or self.items > MAX_ITEMS:
            return {"opaque": "structure that is too deep or too large"}
        if kind is list:
            return [self.encode(item, depth + 1) for item in value]
        if kind in (tuple, set, frozenset):
            return {kind.__name__: [self.encode(item, depth + 1) for item in value]}
        if kind in DICTS:
            return {"dict": [[self.encode(k, depth + 1), self.encode(v, depth + 1)] for k, v in value.items()]}
        if kind is bytes:
            return {"bytes": value.hex()}
        if kind is complex:
            return {"complex": [self.encode(value.real), self.encode(value.imag)]}
        if kind.__name__ == "ListNode":
            return self.linked_list(value, depth)
        if kind.__name__ == "TreeNode":
            return self.tree(value, depth)
        return {"opaque": kind.__name__}

    def linked_list(self, node, depth):
        values, seen = [], set()
        while node is not None:
            if id(node) in seen:
                return {"opaque": "linked list with a cycle"}
            seen.add(id(node))
            values.append(self.encode(node.val, depth + 1))
            node = node.next
        return {"list_node": values}

    def tree(self, root, depth):
        values, level, seen = [], [root], set()
        for node in level:
            if node is None:
                values.append(None)
                continue
            if id(node) in seen:
                return {"opaque": "tree with a cycle"}
            seen.add(id(node))
            values.append(self.encode(node.val, depth + 1))
            level += [node.left, node.right]
        return {"tree_node": values}


DICTS = (dict, collections.defaultdict, collections.OrderedDict, collections.Counter)


def decode(wire, names):
    if type(wire) is list:
        return [decode(item, names) for item in wire]
    if type(wire) is not dict:
        return wire
    ((tag, body),) = wire.items()
    if tag == "float":
        return float(body)
    if tag == "int":
        return int(body, 16)
    if tag == "bytes":
        return bytes.fromhex(body)
    parts = [decode(item, names) for item in body]
    if tag in ("list_node", "tree_node"):
        return names[tag](parts)
    if tag == "complex":
        return complex(*parts)
    return {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}[tag](parts)


# --- one job, in its own process -----------------------------------------------------------------------------------


def run_job(job, send):
    """Load the completion, then make the calls (`calls`) or run its own test function (`test_func_name`)."""
    random.seed(0)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    names = module.__dict__
    exec(compile(job["setup_code"], "setup", "exec"), names)
    exec(compile(job["code"], "solution", "exec"), names)
    if "test_func_name" in job:
        run_test_function(names, job["test_func_name"])
        send(["passed"])
        return
    if "Solution" not in names:
        raise NameError("the completion defines no class Solution")
    solution, instances, current = names["Solution"], {}, None
    for number, (test, method, instance, args, kwargs, watched) in enumerate(json.loads(job["calls"])):
        if test != current:
            instances, current = {}, test
        args = [decode(arg, names) for arg in args]
        kwargs = {name: decode(arg, names) for name, arg in kwargs.items()}
        if instance is None:
            owner = solution()
        else:
            if instance not in instances:
                instances[instance] = solution()
            owner = instances[instance]
        value = getattr(owner, method)(*args, **kwargs)
        encoder = Encoder()
        after = [encoder.encode(args[key] if type(key) is int else kwargs[key]) for key in watched]
        send(["done", number, encoder.encode(value), after])


def run_test_function(names, name):
    """What a careless harness does: believe the completion's own tests, wherever it defines them."""
    if callable(names.get(name)):
        names[name]()
    else:
        getattr(names["Solution"](), name)()


def job_main(job_fd, channel_fd, output_fd, root_fd, limits):
    """Body of a job's process; never returns."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    null = os.open("/dev/null", os.O_RDWR)
    wanted = (null, null if output_fd is None else output_fd, null, job_fd, channel_fd, root_fd)
    for target, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, 32) for fd in wanted]):
        os.dup2(fd, target)
    os.closerange(6, 1024)
    with open(3, "rb") as file:
        job = json.loads(file.read())
    confine(limits)
    os.close(5)
    channel = 4

    def send(message, write=os.write, dumps=json.dumps):
        line = memoryview(dumps(message, separators=(",", ":")).encode() + b"\n")
        while line:
            line = line[write(channel, line) :]

    code = 0
    try:
        run_job(job, send)
    except BaseException as error:
        code = 1
        text = f"{type(error).__name__}: {error}"
        send(["failed", text[:300].encode("utf-8", "replace").decode("utf-8", "replace")])
    try:
        sys.stdout.flush()
    finally:
        os._exit(code)


def confine(limits):
    """Give up what a completion must not have; the order matters, since each step takes a right away."""
    os.fchdir(5)
    if limits["chroot"]:
        os.chroot(".")
    for name, value in limits["rlimits"].items():
        if name == "RLIMIT_NPROC" and not limits["counted_apart"]:
            continue  # it would count the trainer's own threads, and never holds for root
        resource.setrlimit(getattr(resource, name), (value, value))
    if limits["uid"] is not None:
        os.setgroups([])
        os.setresgid(limits["uid"], limits["uid"], limits["uid"])
        os.setresuid(limits["uid"], limits["uid"], limits["uid"])
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    libc.capset(header, (ctypes.c_uint32 * 6)())
    sys.path[:] = []
    sys.path_importer_cache.clear()
    sys.argv[:] = ["solution.py"]
    os.environ.clear()


# --- the template process ------------------------------------------------------------------------------------------


class Template:
    def __init__(self, control):
        self.control = control
        self.wakeup, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.isolation = []
        self.isolate()

    def isolate(self):
        uid, gid = os.getuid(), os.getgid()
        flags = CLONE_NEWNET | CLONE_NEWIPC
        if uid != 0:
            if libc.unshare(CLONE_NEWUSER | flags) == 0:
                write_text("/proc/self/setgroups", "deny")
                write_text("/proc/self/uid_map", f"{uid} {uid} 1")
                write_text("/proc/self/gid_map", f"{gid} {gid} 1")
                self.isolation += ["user namespace", "no network"]
        elif libc.unshare(flags) == 0:
            self.isolation.append("no network")
        self.pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self.may_unshare_pid = self.probe(lambda: libc.unshare(CLONE_NEWPID) == 0)
        self.may_chroot = self.probe(lambda: os.chroot("/") is None)
        self.may_setuid = uid == 0 and self.probe(lambda: os.setresuid(65534, 65534, 65534) is None)
        self.isolation += ["process namespace"] * self.may_unshare_pid + ["empty root"] * self.may_chroot
        self.isolation += ["own user"] * self.may_setuid

    def probe(self, attempt):
        """Whether `attempt` succeeds, tried in a child so that this process keeps its rights."""
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(0 if attempt() else 1)
            except OSError:
                os._exit(1)
        return os.waitpid(pid, 0)[1] == 0

    def serve(self):
        send_json(self.control, {"isolation": self.isolation})
        while True:
            data, fds, _, _ = socket.recv_fds(self.control, 4096, 4)
            if not data:
                return
            request = json.loads(data)
            pid = self.spawn(request, fds)
            for fd in fds:
                os.close(fd)
            send_json(self.control, self.wait(pid, request["wall_limit"]))

    def spawn(self, request, fds):
        limits = {
            "rlimits": request["rlimits"],
            "uid": request["uid"] if self.may_setuid else None,
            "chroot": self.may_chroot,
            "counted_apart": self.may_setuid or "user namespace" in self.isolation,
        }
        job_fd, channel_fd, root_fd, *output = fds
        if self.may_unshare_pid:
            libc.unshare(CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            try:
                job_main(job_fd, channel_fd, output[0] if output else None, root_fd, limits)
            finally:
                os._exit(70)
        if self.may_unshare_pid:
            libc.setns(self.pid_namespace, CLONE_NEWPID)
        return pid

    def wait(self, pid, wall_limit):
        """Wait for the job's process, kill it when it overstays or when the grader is gone, sweep what it left."""
        deadline, overstayed = time.monotonic() + wall_limit, False
        while True:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                break
            left = deadline - time.monotonic()
            ready = select.select([self.wakeup, self.control], [], [], max(0, left))[0]
            if left <= 0 or self.control in ready:
                overstayed = True
                os.kill(pid, signal.SIGKILL)
                done, status, usage = os.wait4(pid, 0)
                break
            if self.wakeup in ready:
                os.read(self.wakeup, 4096)
        self.sweep(pid)
        return {
            "exit": os.waitstatus_to_exitcode(status),
            "cpu": usage.ru_utime + usage.ru_stime,
            "overstayed": overstayed,
        }

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


def write_text(path, text):
    with open(path, "w") as file:
        file.write(text)


def send_json(control, value):
    control.sendall(json.dumps(value).encode() + b"\n")


def main():
    control = socket.socket(fileno=int(sys.argv[1]))
    for name in [*MODULES.split(), *({"_pylong", "_pydatetime"} & sys.stdlib_module_names)]:
        __import__(name)
    sys.argv[:] = ["template"]
    gc.collect()
    gc.freeze()
    Template(control).serve()


if __name__ == "__main__":
    main()
