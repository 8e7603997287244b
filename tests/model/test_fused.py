"""Which kernels compute the experts; the fused ones in Triton's interpreter, compiled for real GPUs, and on a GPU."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from clmoe.errors import ClmoeError
from clmoe.model.backend import VARIABLE, uses_fused
from tests.launch import REPOSITORY, environment

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install -c constraints.txt triton"
)
CASES = Path(__file__).with_name("fused_cases.py")

# both kernels, as launched for 8 experts of rank 64 on bfloat16, compiled without a device
COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from clmoe.model import fused
constants = dict(TOKENS=64, EXPERTS=2, PADDED=64, WIDTH=64, PRECISION="ieee", WIDEN=False, A_column=1, B_rank=1)
for kernel in (fused._forward, fused._backward):
    names = kernel.arg_names
    used = {name: value for name, value in constants.items() if name in names}
    numbers = ("tokens", "width", "experts", "rank", "x_row", "A_rank", "d_row", "B_row")
    types = {name: "constexpr" if name in used else "i32" if name in numbers else "*bf16" for name in names}
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    compiled = triton.compile(ASTSource(kernel, types, used), target=target, options={"num_warps": fused.WARPS})
    assert compiled.asm["cubin"] and "mma" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 99 * 1024, compiled.metadata.shared
print("compiled")
"""


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY, env={**environment(), **variables}, capture_output=True, text=True,
    )  # fmt: skip


@needs_triton
def test_fused_kernels_equal_the_loop_in_the_interpreter() -> None:
    done = run("-m", "pytest", "-p", "no:cacheprovider", str(CASES), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-3000:]


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_fused_kernels_equal_the_loop_on_the_gpu() -> None:
    done = run("-m", "pytest", "-p", "no:cacheprovider", str(CASES))
    assert done.returncode == 0, done.stdout[-3000:]


@needs_triton
@pytest.mark.parametrize("capability", ["80", "90"])
def test_fused_kernels_compile_for_real_gpus(capability: str, tmp_path: Path) -> None:
    done = run("-c", COMPILE, capability, TRITON_CACHE_DIR=str(tmp_path))
    assert done.stdout == "compiled\n", done.stderr[-3000:]


def test_a_cpu_takes_plain_torch_and_so_does_who_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not uses_fused("cpu", torch.float32, 8)
    monkeypatch.setenv(VARIABLE, "torch")
    assert not uses_fused("cuda", torch.float32, 8)


@needs_triton
def test_cuda_takes_the_fused_kernels_where_they_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert all(uses_fused("cuda", dtype, 512) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert not uses_fused("cuda", torch.float64, 8)
    assert not uses_fused("cuda", torch.float32, 513)


def test_cuda_without_triton_takes_plain_torch_unless_it_is_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clmoe.model.backend.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "clmoe.model.fused", raising=False)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not uses_fused("cuda", torch.float32, 8)
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(ClmoeError, match=rf"triton cannot be imported.*{VARIABLE}=torch"):
        uses_fused("cuda", torch.float32, 8)


@pytest.mark.parametrize(("value", "message"), [("cuda", "neither triton nor torch"), ("triton", "not on cpu")])
def test_wrong_choices_are_errors(value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ClmoeError, match=message):
        uses_fused("cpu", torch.float32, 8)
