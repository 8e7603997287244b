"""Which code computes the experts' rank-sized passes: Triton's on CUDA where it can be imported, else torch's."""

import os
from importlib import import_module
from importlib.util import find_spec

import torch

from clmoe.errors import ClmoeError

VARIABLE = "CLMOE_KERNELS"
CHOICES = ("triton", "torch")


@torch.compiler.assume_constant_result
def uses_fused(device: str, dtype: torch.dtype, rank: int) -> bool:
    """Whether the fused kernels serve this device type, input type and rank of one expert; if so they are registered.

    The environment variable ``CLMOE_KERNELS`` decides for a whole process: ``torch`` never takes them, ``triton``
    insists on them (except for types and ranks that they do not serve); without it they are taken on CUDA if triton
    is installed.

    Raises:
        ClmoeError: the variable is neither, or insists where triton is missing, broken or cannot run.
    """
    choice = os.environ.get(VARIABLE)
    if choice is not None and choice not in CHOICES:
        raise ClmoeError(f"{VARIABLE}={choice}: neither {' nor '.join(CHOICES)}; leave it unset to choose by device")
    if choice == "torch" or (choice is None and (device != "cuda" or find_spec("triton") is None)):
        return False
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ClmoeError(f"{VARIABLE}=triton: Triton computes on CUDA, not on {device}; unset it or set it to torch")
    try:
        fused = import_module("clmoe.model.fused")
    except ImportError as error:
        raise ClmoeError(
            f"triton cannot be imported ({error}): install the version that this torch names, or set {VARIABLE}=torch"
        ) from error
    return bool(fused.fits(dtype, rank))
