"""Fixtures for all tests, which run offline on one thread; whatever is slow to make is made once per session."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("CLMOE_DATA_ROOT", None)

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clmoe.bases.llava import LoadedBase, load_base
from clmoe.benchmarks.base import Benchmark, load_benchmark
from clmoe.config import ModelConfig
from tests import support
from tests.runs import Runs

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Exempt the objects that the imports made from later garbage collections; this saves 0.3 s each."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny LLaVA, for ``model.path``."""
    return support.save_tiny(tmp_path_factory.mktemp("tiny-llava"))


@pytest.fixture(scope="session")
def pristine_base(tiny_folder: Path) -> LoadedBase:
    """The tiny LLaVA as loaded. Never patch or change it; use ``tiny_base`` for that."""
    return load_base(ModelConfig(path=str(tiny_folder)))


@pytest.fixture
def new_base(pristine_base: LoadedBase) -> Callable[[], LoadedBase]:
    """A function that makes another independent loaded base on every call."""
    return lambda: support.copy_base(pristine_base)


@pytest.fixture
def tiny_base(new_base: Callable[[], LoadedBase]) -> LoadedBase:
    """A loaded base that belongs to the test, which may change it."""
    return new_base()


@pytest.fixture(scope="session")
def mini_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of the miniature benchmark; tests must not change its data."""
    return support.write_benchmark(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="session")
def mini(mini_yaml: Path) -> Benchmark:
    """The miniature benchmark, with the tasks ``colour``, ``count`` and ``side``."""
    return load_benchmark(str(mini_yaml))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, mini_yaml: Path) -> Runs:
    """Runs ``clmoe`` on the miniature benchmark and keeps the checkpoints for other tests."""
    return Runs(tmp_path_factory.mktemp("runs"), tiny_folder, mini_yaml)
