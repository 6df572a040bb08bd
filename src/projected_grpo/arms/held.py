"""The method's own effect without the method: nothing is taken out, δ is held off along the real basis.

The one-sided gate and AdamW push δ away from hacking along every axis, and in the microcosm that is what protects
(docs/findings.md). This arm does that alone: V δ is kept at or above a floor that rises for a while and then stays.
"""

from dataclasses import replace

from projected_grpo.arms.projected import ARM as PROJECTED

ARM = replace(PROJECTED, name="held", summary="δ is held at or above a rising floor along the real basis")
