"""The arms of the experiment. A new one is one module here and one line below."""

from projected_grpo.arms import flipped, held, oracle, placebo, projected, random, random_matched, vanilla
from projected_grpo.arms.base import Arm, BasisSource

ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        vanilla.ARM,
        projected.ARM,
        held.ARM,
        random.ARM,
        random_matched.ARM,
        placebo.STYLE,
        placebo.WRONG,
        flipped.ARM,
        oracle.ARM,
    )
}

__all__ = ["ARMS", "Arm", "BasisSource"]
