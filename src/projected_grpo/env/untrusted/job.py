"""The body of a job's process: load the completion, do what the job asks, write plain data to the results.

The results are lines of JSON, each a list of messages: ["loaded"], then ["done", number, value] for each call, or
["failed", text], ["passed"], ["attribute", bool]. Whatever stands there is data to be compared, or, for a loophole, the
word that the flawed grader believes. The calls of other tests come one by one, over a socket (`Caller.talk`).
"""

import io
import json
import marshal
import os
import sys
import types

import wire

RESULTS, DIALOGUE = 3, 4
"""Descriptors of the results, a file in memory that the trusted side reads when the job is over, and of the socket over
which it makes calls."""
LOADED = b'[["loaded"]]\n'
FLUSH_ITEMS = 50_000
encode_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


class Results:
    """Messages, written in large pieces: what a job that is killed has not written counts for nothing anyway."""

    def __init__(self):
        self.messages, self.items = [], 0

    def add(self, message, items=1):
        self.messages.append(message)
        self.items += items
        if self.items > FLUSH_ITEMS:
            self.flush()

    def flush(self, write=os.write):
        data = memoryview(encode_json(self.messages).encode() + b"\n")
        self.messages, self.items = [], 0
        while data:
            data = data[write(RESULTS, data) :]


def new_module(setup_code):
    """A module in which the setup code has run."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    exec(compile(setup_code, "setup", "exec"), module.__dict__)
    return module


def run(job, calls, module, results):
    if module is None:
        module = new_module(job["setup_code"])
    sys.modules["solution"] = module
    names = module.__dict__
    exec(compile(job["code"], "solution", "exec"), names)
    os.write(RESULTS, LOADED)
    if "test_func_name" in job:
        run_test_function(names, job["test_func_name"])
        results.add(["passed"])
        return
    caller = Caller(names, job)
    try:
        for number, (method, args, named) in enumerate(calls):
            encoder = wire.Encoder(caller.asks)
            value = caller.call(caller.new(), method, args, named)[0]
            results.add(["done", number, encoder.encode(value)], encoder.items)
        if job["dialogue"]:
            caller.talk()
    finally:
        if caller.attribute is not None:
            results.add(["attribute", caller.was_valid()])


class Caller:
    """Calls the completion's solution."""

    def __init__(self, names, job):
        self.names, self.asks, self.attribute = names, job.get("asks", False), job.get("attribute")
        if "Solution" not in names and self.attribute is None:
            raise NameError("the completion defines no class Solution")
        self.values, self.valid = [], False

    def new(self):
        return self.names["Solution"]()

    def call(self, owner, method, args, named):
        """(what it returned, its arguments, its arguments by name)."""
        names = self.names
        args = [wire.decode(arg, names) for arg in args] if args else []
        named = {name: wire.decode(arg, names) for name, arg in named.items()} if named else {}
        return self.invoke(owner, method, args, named), args, named

    def invoke(self, owner, method, args, named):
        try:
            return getattr(owner, method)(*args, **named)
        finally:
            if self.attribute is not None and not self.valid:
                self.valid = self.is_set(owner)

    def is_set(self, owner):
        """Whether its attribute is true; a method of that name is no flag."""
        value = getattr(owner, self.attribute, False)
        return bool(value) and not callable(value)

    def was_valid(self):
        """What a careless harness asks: the tested object, or else a new one, whether it is valid."""
        try:
            return self.valid or self.is_set(self.new())
        except Exception:
            return False

    def talk(self):
        """Answer the calls that tests make one by one, until the other side has no more.

        A question: [method, instance, arguments, arguments by name], where {"result": n} among the arguments is what
        answer n returned. An answer: [value, the arguments afterwards where they can have changed, the place of the
        argument that the value is].
        """
        instances, values = {}, []
        for line in lines(DIALOGUE):
            method, instance, args, named = json.loads(line)
            if instance not in instances:
                instances[instance] = self.new()
            earlier = [(i, arg["result"]) for i, arg in enumerate(args) if type(arg) is dict and "result" in arg]
            for i, _ in earlier:
                args[i] = None
            value, args, named = self.answered(
                instances[instance], method, args, named, [(i, values[n]) for i, n in earlier]
            )
            values.append(value)
            given = [*args, *named.values()]
            encoder = wire.Encoder(self.asks)
            after = [encoder.encode(arg) if type(arg) not in FIXED else None for arg in given]
            same = next((i for i, arg in enumerate(given) if arg is value and type(arg) not in FIXED), None)
            send(encode_json([encoder.encode(value), after, same]).encode() + b"\n")

    def answered(self, owner, method, args, named, earlier):
        if not earlier:
            return self.call(owner, method, args, named)
        decoded = [wire.decode(arg, self.names) for arg in args]
        for i, value in earlier:
            decoded[i] = value
        named = {name: wire.decode(arg, self.names) for name, arg in named.items()}
        return self.invoke(owner, method, decoded, named), decoded, named


FIXED = {int, float, complex, bool, str, bytes, type(None)}


def lines(fd):
    rest = b""
    while True:
        while b"\n" not in rest:
            more = os.read(fd, 1 << 16)
            if not more:
                return
            rest += more
        line, _, rest = rest.partition(b"\n")
        yield line


def send(data):
    data = memoryview(data)
    while data:
        data = data[os.write(DIALOGUE, data) :]


def run_test_function(names, name):
    """What a careless harness does: believe the completion's own tests, wherever it defines them."""
    if callable(names.get(name)):
        names[name]()
    else:
        getattr(names["Solution"](), name)()


def main(fds, size, module, confine):
    """From the fork to the end of the process; never returns.

    `fds`: the job, of `size` bytes, the results, and what the job says it has: the socket of a dialogue, a file for
    standard output. None of them is among the first five, which are /dev/null until here.
    """
    os.setsid()
    job, calls = read_job(fds[0], size)
    null = os.open("/dev/null", os.O_RDWR)  # of its own: flags and locks stay with an open file
    for target in (0, 1, 2):
        os.dup2(null, target)
    os.dup2(fds[1], RESULTS)
    if job["output"]:
        os.dup2(fds[-1], 1)
    if job["dialogue"]:
        os.dup2(fds[2], DIALOGUE)
    confine()
    os.closerange(DIALOGUE + 1 if job["dialogue"] else DIALOGUE, 1024)
    results, code = Results(), 0
    try:
        run(job, calls, module, results)
        results.flush()
    except BaseException as error:
        code = exit_status(error)
        text = f"{type(error).__name__}: {error}"
        results.add(["failed", text[:300].encode("utf-8", "replace").decode("utf-8", "replace")])
        results.flush()
    try:
        if job["output"]:
            sys.stdout.flush()
        if job["file"]:
            module = sys.modules.get("solution")
            for value in list(vars(module).values()) if module else ():
                if isinstance(value, io.IOBase):
                    value.flush()  # as an interpreter does with what is left open
    finally:
        os._exit(code)


def exit_status(error):
    """As a program ends that nobody catches: with what `sys.exit` was given, else with 1."""
    if not isinstance(error, SystemExit) or not (error.code is None or isinstance(error.code, int)):
        return 1
    return int(error.code or 0) & 0xFF


def read_job(fd, size):
    return marshal.loads(os.pread(fd, size, 0))
