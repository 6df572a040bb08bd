"""What an arm is: a name, a line for people, and how it comes by its directions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from projected_grpo.basis import HackBasis


class BasisSource(Protocol):
    """Where an arm's directions come from, on the policy as it stands when asked."""

    seed: int

    def real(self) -> HackBasis:
        """The basis of the configured pairs."""

    def placebo(self, real: HackBasis, kind: str) -> HackBasis:
        """A basis from the placebo pairs of a kind in the modules and the k of `real`, without a floor."""


@dataclass(frozen=True)
class Arm:
    """One arm of the experiment.

    make_basis: the directions that the arm projects out, or only measures with `measure_only`.
    match_real: set the overshoot of each step so that as much is taken out as the real basis would.
    true_reward: the ground truth pays and the flawed grader does not.
    """

    name: str
    summary: str
    make_basis: Callable[[BasisSource], HackBasis]
    measure_only: bool = False
    match_real: bool = False
    true_reward: bool = False
