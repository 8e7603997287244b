"""clmoe: continual instruction tuning of LLaVA-1.5 with LoRA-expert mixture-of-experts.

Importing it registers the LoRA-expert adapter with peft, so that ``PeftModel.from_pretrained`` can load it.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

__version__ = "0.2.0"

PUBLIC = {
    "run": "clmoe.sequence",
    "load": "clmoe.evaluate.loaded",
    "ExpertConfig": "clmoe.experts.config",
    "routing": "clmoe.experts.routing",
    "RouteSelection": "clmoe.experts.routing",
    "RouteTrace": "clmoe.experts.routing",
    "ClmoeError": "clmoe.errors",
}
"""The public names, described in docs/api.md, and where they live."""

# The command line skips the registration, which imports torch and peft and takes seconds: `clmoe --help` answers at
# once, and the verbs import the adapter when they need it.
_COMMAND_LINE = ("-m", "clmoe") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False) or "clmoe.cli" in sys.orig_argv
_COMMAND_LINE |= bool(sys.argv) and Path(sys.argv[0]).name == "clmoe"
if not _COMMAND_LINE:
    if reason := importlib.import_module("clmoe.utils.versions").unfit(absent=False):
        raise ImportError(reason)
    importlib.import_module("clmoe.experts.model")


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(importlib.import_module(PUBLIC[name]), name)
    raise AttributeError(f"module 'clmoe' has no attribute {name!r}")
