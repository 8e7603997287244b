"""clmoe: continual instruction tuning of LLaVA-1.5 with LoRA-expert mixture-of-experts.

Importing it registers the LoRA-expert adapter with peft, so that ``PeftModel.from_pretrained`` can load it.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clmoe.errors import ClmoeError as ClmoeError
    from clmoe.evaluate.answer import load as load
    from clmoe.model.adapter import ExpertConfig as ExpertConfig
    from clmoe.model.routing import RouteSelection as RouteSelection
    from clmoe.model.routing import RouteTrace as RouteTrace
    from clmoe.model.routing import routing as routing

__version__ = "0.1.0"

PUBLIC = {
    "load": "clmoe.evaluate.answer",
    "ExpertConfig": "clmoe.model.adapter",
    "routing": "clmoe.model.routing",
    "RouteSelection": "clmoe.model.routing",
    "RouteTrace": "clmoe.model.routing",
    "ClmoeError": "clmoe.errors",
}
"""The public names, described in docs/api.md, and where they live."""

# The command line skips the registration, which imports torch and peft and takes seconds: its verbs import the
# adapter when they need it, and answer at once when there is nothing to do.
_COMMAND_LINE = "clmoe.cli" in sys.orig_argv or (bool(sys.argv) and Path(sys.argv[0]).name == "clmoe")
if not _COMMAND_LINE:
    from clmoe.model import adapter as adapter


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(importlib.import_module(PUBLIC[name]), name)
    raise AttributeError(f"module 'clmoe' has no attribute {name!r}")
