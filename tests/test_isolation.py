"""The grader as a plain user where the kernel has no user namespaces: what filter and Landlock still keep in."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from projected_grpo.env.untrusted import confine
from projected_grpo.paths import data_path

# Becomes user 1000 of a new user namespace that grants no further ones, and starts the grader there.
INTO_THE_OPEN = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
uid, gid = os.getuid(), os.getgid()
if libc.unshare(0x10000000) != 0:
    sys.exit(77)
for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
    open(f"/proc/self/{name}", "w").write(text)
try:
    open("/proc/sys/user/max_user_namespaces", "w").write("0")
except OSError:
    sys.exit(77)
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1], *sys.argv[2:]])
"""

GRADES = """
import json, os, sys
from projected_grpo.env.grader import Grader, GradeRequest
from projected_grpo.env.problems import DEFAULT_SETUP, Problem
assert os.getuid() == 1000
code = json.loads(sys.argv[1])
problem = Problem("p", "", "f", "", "", ("assert Solution().f(1) == 424242",), DEFAULT_SETUP, "easy")
with Grader(1) as grader:
    requests = [GradeRequest(problem, f"```python\\n{text}\\n```", mode="none") for text in code.values()]
    grades = grader.grade(requests)
    print(json.dumps([grader.isolation, {name: [g.gt_pass, g.error] for name, g in zip(code, grades)}]))
"""

# Each answers right where it gets what it reaches for.
REACHES = {
    "reads the data": "open(DATA).read()",
    "reads the interpreter's files": "import os; os.listdir(os.path.dirname(os.__file__))",
    "writes beside its directory": "import os; open('../escaped', 'w').write('x')",
    "makes a socket": "import socket; socket.socket()",
    "makes a process": "import os\nif os.fork() == 0: os._exit(0)",
    "starts a program": "import subprocess; subprocess.run(['/bin/true'])",
    "signals its parent": "import os; os.kill(os.getppid(), 0)",
    "signals everybody": "import os; os.kill(-1, 0)",
    "traces its parent": "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "changes the mode of its directory": "import os; os.chmod('.', 0o755)",
    "changes the times of its directory": "import os; os.utime('.', (7, 7))",
    "limits its parent": "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)",
    "slows its parent": "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 5)",
    "moves its parent": "import os; os.sched_setaffinity(os.getppid(), {0})",
    "has a signal sent": "import fcntl, os\nif fcntl.fcntl(0, 8, os.getppid()): raise OSError",
    "writes to somebody's socket": (
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "try: a.sendto(b'x', '/nowhere')\nexcept PermissionError: raise\nexcept OSError: pass"
    ),
    "takes shared memory": "import ctypes\nif ctypes.CDLL(None).shmat(0, None, 0) in (-1, 2**64 - 1): raise OSError",
    "makes a file in memory": "import os; os.memfd_create('x')",
}
HONEST_HELPERS = (
    "import resource, socket, asyncio\nresource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))\n"
    "a, b = socket.socketpair()\na.send(b'x')\nassert b.recv(1) == b'x'\nasyncio.run(asyncio.sleep(0))\n"
)
HONEST = "class Solution:\n    def f(self, n):\n        return 424242\n"


@pytest.fixture(scope="module")
def found():
    attempts, data = {}, data_path("problems", "eval.toml")
    for name, reach in REACHES.items():
        body = f"try:\n{textwrap.indent(reach.replace('DATA', repr(str(data))), '    ')}\n"
        attempts[name] = f"OK = True\n{body}except Exception:\n    OK = False\n{HONEST}".replace(
            "424242", "424242 * OK"
        )
    attempts["honest"] = HONEST
    attempts["limits itself and uses its own sockets"] = HONEST_HELPERS + HONEST
    attempts["uses its directory"] = "open('x', 'w').write('1')\nassert open('x').read() == '1'\n" + HONEST
    attempts["uses threads"] = "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\n" + HONEST
    done = subprocess.run(
        [sys.executable, "-c", INTO_THE_OPEN, GRADES, json.dumps(attempts)], capture_output=True, text=True
    )
    if done.returncode == 77:
        pytest.skip("this machine has no user namespaces to play one without them in")
    assert done.returncode == 0, done.stderr[-2000:]
    isolation, grades = json.loads(done.stdout)
    return isolation, grades


def test_only_what_needs_no_right_is_left(found):
    isolation, _ = found
    assert {entry.split()[0] for entry in isolation} <= {"system", "landlock"}


def test_honest_completions_are_right_there_too(found):
    _, grades = found
    for name in ("honest", "uses its directory", "uses threads", "limits itself and uses its own sockets"):
        assert grades[name] == [True, None]


@pytest.mark.parametrize("name", REACHES)
def test_nothing_is_reached(found, name):
    isolation, grades = found
    files = name.startswith(("reads", "writes"))
    needed = "landlock" if files else "system call filter"
    if not any(entry.startswith(needed) for entry in isolation):
        pytest.skip(f"this kernel has no {needed}")
    assert grades[name] == [False, None]


@pytest.mark.parametrize("machine", confine.ARCHITECTURES)
def test_the_filter_of_every_processor_is_well_formed(machine):
    """Jumps stay inside the program and every way through it ends in a verdict."""
    program = confine.Filter(machine).buffer.raw
    steps = [program[i : i + 8] for i in range(0, len(program), 8)]
    for at, step in enumerate(steps):
        code, yes, no = int.from_bytes(step[:2], "little"), step[2], step[3]
        if code & 0x07 == 0x05:
            assert at + 1 + max(yes, no) < len(steps)
    assert int.from_bytes(steps[-1][:2], "little") == confine.RETURN
    numbers = [columns[list(confine.ARCHITECTURES).index(machine)] for columns in confine.DENIED.values()]
    assert len({n for n in numbers if n is not None}) == sum(n is not None for n in numbers)


def test_system_call_numbers_are_this_kernels_own():
    """Against asm/unistd_64.h, wherever the C headers are installed."""
    for header in (path for path in Path("/usr/include").glob("**/asm/unistd_64.h") if "x86_64" in str(path)):
        lines = [line.split() for line in header.read_text().splitlines() if line.startswith("#define __NR_")]
        defined = {name.removeprefix("__NR_"): int(number) for _, name, number in lines}
        ours = {name: numbers[0] for name, numbers in confine.DENIED.items() if numbers[0] is not None}
        common = ours.keys() & defined.keys()
        assert {name: ours[name] for name in common} == {name: defined[name] for name in common}
