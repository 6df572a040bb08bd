"""The method's drift without its projection: δ is held off along the real basis.

The one-sided gate and AdamW push δ away from hacking along every axis, and that push seems to be a large part of what
protects in the microcosm (docs/findings.md). This arm asks for it outright, and for how far it goes: no gradient and no
update is projected, V δ is raised to a limit wherever it lies below, and the limit rises for a while and then stays.
"""

from dataclasses import replace

from projected_grpo.arms.projected import ARM as PROJECTED

ARM = replace(PROJECTED, name="held", summary="δ is held at or above a rising floor along the real basis")
