"""Control: the real span, oriented by coin flips; it tests the orientation and is no null."""

from projected_grpo.arms.base import Arm, BasisSource
from projected_grpo.basis import HackBasis
from projected_grpo.controls import flipped_basis


def make_basis(source: BasisSource) -> HackBasis:
    return flipped_basis(source.real(), source.seed)


ARM = Arm("flipped", "the real basis with each pair's sides swapped at random", make_basis)
