"""What the untrusted side left, read with suspicion, and the ground truth's verdict over it."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from projected_grpo.env import plain
from projected_grpo.env.compare import Oracle
from projected_grpo.env.sandbox import Ended, Limits, Outcome

TOO_MANY = f"more than {plain.MAX_NODES} values in its results"
MAX_LINES = 1000
"""Of results; the worker writes a line for tens of thousands of values."""


def judge(oracle: Oracle, outcome: Outcome, limits: Limits) -> tuple[bool, str | None]:
    """(Does the ground truth pass, why the run did not end well) from what the untrusted side left."""
    if reason := ended_by_limit(outcome, limits):
        return False, reason
    if outcome.exit_code == 0 and outcome.data == oracle.perfect:
        return True, None
    results, failure = read_results(outcome)
    if results is None:
        return False, "its channel holds more than results"
    if finished(oracle, outcome, results) and failure is None and outcome.exit_code == 0:
        passed = outcome.talk_held and oracle.judge(results) is None
        too_many = not passed and any(isinstance(r, plain.Opaque) and r.type_name == TOO_MANY for r in results)
        return passed, TOO_MANY if too_many else None
    if failure is None:
        failure = f"its process ended early (exit code {outcome.exit_code})"
    return False, failure


def finished(oracle: Oracle, outcome: Outcome, results: list[Any] | None) -> bool:
    """Whether every call was answered, by the results that `read_results` found."""
    return results is not None and len(results) == len(oracle.calls) and not outcome.talk_broken


class Dialogue:
    """Makes the calls of a test over a socket, and takes what comes back for what it is: data."""

    def __init__(self, send_line: Callable[[bytes], None], read_line: Callable[[], bytes]) -> None:
        """Both raise Ended when there is nobody there any more."""
        self.send_line, self.read_line = send_line, read_line
        self.decoder = plain.Decoder()
        self.calls = 0

    def ask(self, method: str, instance: int, args: list, named: dict[str, Any]) -> Any:
        """One call of the solution; the arguments become what it has made of them. Raises Ended, TypeError."""
        question = [method, instance, list(map(plain.encode, args)), {k: plain.encode(v) for k, v in named.items()}]
        self.send_line(json.dumps(question, separators=(",", ":")).encode() + b"\n")
        try:
            match plain.loads(self.read_line()):
                case [value, list(after), same] if len(after) == len(args) + len(named):
                    answer = _decoded(self.decoder, value)
                case _:
                    raise Ended
        except (ValueError, RecursionError):
            raise Ended from None
        given = [*args, *named.values()]
        for before, now in zip(given, after, strict=True):
            if now is not None or isinstance(before, (*plain.MUTABLE, plain.ListNode, plain.TreeNode)):
                plain.update(before, _decoded(self.decoder, now))
        number, self.calls = self.calls, self.calls + 1
        if type(same) is int and 0 <= same < len(given):
            return given[same]
        return replace(answer, call=number) if isinstance(answer, plain.Opaque) else answer


def ended_by_limit(outcome: Outcome, limits: Limits) -> str | None:
    """The limit that a run went over, in words, or None."""
    if outcome.overstayed:
        return f"wall limit of {limits.wall_seconds:g} s"
    # The kernel ends it by a clock of its own, which runs behind or ahead of what it reports.
    killed = outcome.exit_code == -9 and outcome.cpu_seconds > 0.5 * limits.cpu_seconds
    if killed or outcome.cpu_seconds > limits.cpu_seconds:
        return f"CPU limit of {limits.cpu_seconds:g} s"
    return f"more than {limits.message_bytes} bytes of results" if outcome.cut_off else None


def was_loaded(outcome: Outcome) -> bool:
    """Whether the completion's module ran to its end before anything else happened."""
    return b'[["loaded"]]\n' in outcome.data


def read_results(outcome: Outcome) -> tuple[list[Any] | None, str | None]:
    """(Values in order, the failure that it reported); None where the channel was tampered with.

    The first message says that the completion is loaded, the numbers count up from 0 without a gap, and a failure comes
    last: the worker writes nothing else.
    """
    results: list[Any] = []
    failure: str | None = None
    loaded = False
    decoder = plain.Decoder()
    if outcome.data.count(b"\n") > MAX_LINES:
        return None, None
    *lines, _unfinished = outcome.data.split(b"\n")
    try:
        messages = [message for line in lines for message in plain.loads(line)]
    except (ValueError, TypeError, RecursionError):
        return None, None
    for message in messages:
        match message:
            case ["loaded"] if not loaded and failure is None:
                loaded = True
            case ["done", int(number), value] if loaded and number == len(results) and failure is None:
                results.append(_decoded(decoder, value))
            case ["attribute", bool()] if failure is None:
                pass
            case ["failed", str(text)] if failure is None:
                failure = text[:300].encode("utf-8", "backslashreplace").decode()
            case _:
                return None, None
    return results, failure


def _decoded(decoder: plain.Decoder, wire: Any) -> Any:
    try:
        return decoder.decode(wire)
    except plain.TooManyValues:
        return plain.Opaque(TOO_MANY)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return plain.Opaque("malformed message")
