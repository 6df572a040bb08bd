"""The method: project the real basis out."""

from projected_grpo.arms.base import Arm

ARM = Arm("projected", "the real basis is projected out", lambda source: source.real())
