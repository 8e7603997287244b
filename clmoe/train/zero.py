"""DeepSpeed's ZeRO: its settings in configs/deepspeed, and what a process needs to start it."""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec
from pathlib import Path

from clmoe.errors import ClmoeError
from clmoe.system.memory import Sharding
from clmoe.utils.files import read_json
from clmoe.utils.paths import find_config

DEFAULT_BUCKET = 5e8  # DeepSpeed's own, where a settings file names none or says "auto"


def deepspeed_settings(name: str) -> Path:
    """``zero2`` -> ``configs/deepspeed/zero2.json``; the path of a JSON file is taken as it is.

    Raises:
        ClmoeError: no such settings, DeepSpeed is not installed, it would round all parameters, or it is not ZeRO.
    """
    path = find_config("deepspeed", name, ".json")
    settings = read_json(path)
    if find_spec("deepspeed") is None:
        raise ClmoeError("--deepspeed: DeepSpeed is not installed; pip install 'clmoe[train]'")
    for kind in ("bf16", "fp16"):
        if settings.get(kind, {}).get("enabled"):
            raise ClmoeError(
                f'{path}: {kind} would round the adapter\'s float32 weights; set "enabled": false and choose the '
                "base's type with model.dtype"
            )
    if settings.get("zero_optimization", {}).get("stage") not in (1, 2, 3):
        raise ClmoeError(f"{path}: zero_optimization.stage must be 1, 2 or 3")
    return path


def spreads_weights(settings: Path) -> bool:
    """ZeRO-3: also the frozen base is cut into parts, one per process."""
    return read_json(settings)["zero_optimization"]["stage"] == 3


def planned_sharding(name: str | None, gpus: int) -> Sharding:
    """How ZeRO's settings spread a training over ``gpus``; DeepSpeed need not be installed.

    Raises:
        ClmoeError: no such settings.
    """
    if name is None:
        return Sharding(gpus)
    zero = read_json(find_config("deepspeed", name, ".json")).get("zero_optimization", {})

    def elements(key: str) -> int:
        value = zero.get(key)
        return int(value if isinstance(value, int | float) else DEFAULT_BUCKET)

    stage = int(zero.get("stage", 0))
    offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    twice = 2 if stage < 3 and zero.get("overlap_comm") else 1
    prefetch = elements("stage3_prefetch_bucket_size") if stage == 3 else 0
    return Sharding(gpus, stage, offload, twice * elements("reduce_bucket_size"), prefetch)


def stand_alone() -> None:
    """Without a launcher: say in the environment that this process is the only one, which DeepSpeed insists on."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in alone.items()})
