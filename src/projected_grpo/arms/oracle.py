"""The ceiling: GRPO under a grader without the loophole; nothing is projected, the real basis measures."""

from dataclasses import replace

from projected_grpo.arms.vanilla import ARM as VANILLA

ARM = replace(VANILLA, name="oracle", summary="the ground truth as reward, not touched", true_reward=True)
