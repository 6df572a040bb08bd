"""The two ways in which a run ends badly, told apart by their exit codes.

`InputError` is the user's to mend: bad arguments, bad files. The command line prints its one line and exits 2.
`RunFault` is ours or the machine's: a NaN loss, a grader that failed. It stops the run with what caused it on disk,
and exits 1. Everything else is a bug and keeps its traceback.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEXT_TO_NONE = 65536


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: the thing, what is wrong with it, and the fix."""


@contextmanager
def saving_faults(path: Path) -> Iterator[None]:
    """A fault is never a reward of 0: what caused it is saved in `path` and the fault goes on, naming it."""
    try:
        yield
    except RunFault as fault:
        if fault.completion is None:
            raise
        path.parent.mkdir(parents=True, exist_ok=True)
        text = f"problem {fault.problem_id}\n{fault.completion}\n"
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        raise RunFault(f"{fault}; what caused it is in {path}") from fault


def is_disk_full(error: Exception) -> bool:
    """As the system says it; a library may say it otherwise."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def naming_a_full_disk(folder: Path, remedy: str) -> Iterator[None]:
    """A disk that is full comes out of each library in its own words, or in none; here it becomes one line.

    Raises:
        RunFault: something inside failed, and it says that no space is left, or there is next to none on the disk.
    """
    try:
        yield
    except (RunFault, InputError):
        raise
    except Exception as error:
        says_so = is_disk_full(error) or "No space left" in str(error)
        if not says_so and shutil.disk_usage(folder).free > NEXT_TO_NONE:
            raise
        raise RunFault(f"the disk that {folder} lies on is full; {remedy}") from error


class RunInterrupted(Exception):
    """The user stopped a run; the message says where it stands and how to go on. Exit code 130, as for any Ctrl-C."""


class RunFault(RuntimeError):
    """A run cannot go on and its result cannot be trusted.

    completion, problem_id: what it was working on, for whoever saves the evidence.
    """

    def __init__(self, message: str, completion: str | None = None, problem_id: str | None = None) -> None:
        super().__init__(message)
        self.completion, self.problem_id = completion, problem_id
