"""Make a tuner of ours a PEFT method like any other: PEFT has no door for that, so this opens one, once.

`peft.register_peft_method` refuses a name that is not a member of the enum `PeftType`, so the member is added first:
value, name, the enum's three maps, and the class attribute. Tried with PEFT 0.21; the package pins that range. A
process that loads such an adapter must `import projected_grpo` first, before or after `peft`.
"""

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Add `PeftType.<name>` (upper case) with its classes; does nothing when it is there already."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._value_ = member._name_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
