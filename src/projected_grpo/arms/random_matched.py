"""Control: what does removing that much of the gradient do, whatever its direction?"""

from dataclasses import replace

from projected_grpo.arms.random import ARM as RANDOM

ARM = replace(
    RANDOM,
    name="random_matched",
    summary="the random rows, overshot to remove the real basis's share of the gradient",
    match_real=True,
)
