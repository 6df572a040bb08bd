"""Control: what does any subspace of that size do?"""

from projected_grpo.arms.base import Arm, BasisSource
from projected_grpo.basis import HackBasis
from projected_grpo.controls import random_basis


def make_basis(source: BasisSource) -> HackBasis:
    return random_basis(source.real(), source.seed)


ARM = Arm("random", "Haar-random rows in the real basis's modules, k by k", make_basis)
