"""Controls: directions from pairs whose two sides are equally honest, reported apart by kind."""

from projected_grpo.arms.base import Arm

STYLE = Arm(
    "placebo_style",
    "a basis from honest/honest pairs that differ in style",
    lambda source: source.placebo(source.real(), "style"),
)
WRONG = Arm(
    "placebo_wrong",
    "a basis from wrong/wrong pairs without the loophole",
    lambda source: source.placebo(source.real(), "wrong"),
)
