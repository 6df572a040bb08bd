"""GRPO as it is: the real basis measures, nothing is touched."""

from projected_grpo.arms.base import Arm

ARM = Arm("vanilla", "measured against the real basis, not touched", lambda source: source.real(), measure_only=True)
