"""Commands of the microcosm."""

from dataclasses import dataclass

from projected_grpo.cli_options import console, parse
from projected_grpo.errors import InputError


@dataclass(frozen=True)
class MakeMicroOptions:
    seed: int = 0
    """Of corpus, initialisation and order; the model's name is then `micro-SEED`, and `micro` for 0."""


def make_micro(args: list[str]) -> None:
    """The base model of the microcosm, trained from scratch into the cache; checks that it is fit."""
    options = parse(MakeMicroOptions, args, "make-micro")
    if options.seed < 0:
        raise InputError(f"--seed {options.seed} must be at least 0")
    console()
    from projected_grpo.micro.make import make_micro

    make_micro(options.seed)


COMMANDS = {"make-micro": make_micro}
