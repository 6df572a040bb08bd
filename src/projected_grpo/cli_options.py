"""What the commands share: arguments into typed options, and the console.

tyro does the work; its error box is folded into the one line that this command line promises.
"""

import contextlib
import io
import itertools
import re
import warnings
from collections.abc import Callable, Set
from dataclasses import fields
from typing import Any

import tyro

from projected_grpo.config import TrainConfig
from projected_grpo.errors import InputError
from projected_grpo.presets import ARM_SETTINGS, PRESETS, of_arm

PROG = "projected-grpo"
DEFAULT_PRESET = "full"


def console() -> None:
    from projected_grpo.steplog import setup_console

    setup_console()
    # TRL's and PEFT's own calls into transformers, which a user of ours cannot change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def take(args: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of a flag that decides the other flags' defaults, and the arguments without it."""
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name == flag:
            if not equals and i + 1 == len(args):
                raise InputError(f"{flag} needs a value")
            return (value, args[:i] + args[i + 1 :]) if equals else (args[i + 1], args[:i] + args[i + 2 :])
    return None, args


def copy_fields(target: type, shared: type, source: Any, skip: Set[str] = frozenset()) -> Any:
    """A `target` whose fields of `shared` that `source` has too are taken from `source`."""
    names = {f.name for f in fields(shared)} - skip
    return target(**{name: getattr(source, name) for name in names if hasattr(source, name)})


def with_preset(args: list[str], command: str, build: Callable[[TrainConfig], Any]) -> Any:
    if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
        args = [DEFAULT_PRESET, *args]  # naming the arm alone gives the published setting
    arm, _ = take(args, "--arm")
    presets = {
        name: (text, build(config if arm not in ARM_SETTINGS else of_arm(config, arm)))
        for name, (text, config) in PRESETS.items()
    }
    return parse(None, args, command, presets=presets)


def parse(kind: type | None, args: list[str], command: str, default: Any = None, presets: dict | None = None) -> Any:
    """tyro, with its error box folded into the one line that this command line promises."""
    errors = io.StringIO()
    prog = f"{PROG} {command}"
    try:
        with contextlib.redirect_stderr(errors):
            if presets is not None:
                return tyro.extras.overridable_config_cli(presets, args=args, prog=prog)
            kwargs = {} if default is None else {"default": default}
            return tyro.cli(kind, args=args, prog=prog, **kwargs)
    except SystemExit as ended:
        if not ended.code:
            raise
        raise InputError(_one_line(errors.getvalue(), prog)) from None


def _one_line(box: str, prog: str) -> str:
    """The first paragraph of tyro's box, without its frame, colours and title."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip(" │|") for line in plain.splitlines()]
    starts = [i + 1 for i, line in enumerate(lines) if re.match(r"^[╭+─-]", line)]
    first = list(itertools.takewhile(lambda line: not re.match(r"^[╰+─-]+", line), lines[starts[0] if starts else 0 :]))
    what = " ".join(first).rstrip(".")
    if what.startswith("Missing from"):
        what = "missing " + ", ".join(line.split()[0] for line in lines if line.startswith("--"))
    return f"{what}; see {prog} --help"
