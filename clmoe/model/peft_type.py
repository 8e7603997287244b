"""Our member of peft's enum of methods. It has to exist before our configuration can be built."""

from peft.utils import PeftType

PEFT_NAME = "clmoe"


def register_peft_type() -> None:
    """Add it once; peft offers no public way (tests/model/test_peft.py guards it)."""
    name = PEFT_NAME.upper()
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
