"""The optional files of a run folder about its growth, its routers and its task locator.

    parameters.csv   task,trainable,stored            parameters trained in a task, and stored after it
    expansion.json   [{"task": ..., "blocks": {...}}]  what the probes of LLaVA-CMoE said of each block
    usage.csv        task,block,expert,share          the experts' shares of the routers' weight
    locator.csv      after,decider,task,located,count  for which task the test questions were taken

A file that is absent reads as no rows. An unfinished run has rows for its first tasks only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clmoe.errors import ClmoeError
from clmoe.report.reading import check_field, is_number, read_json, read_rows, share_number, whole_number

# Name in locator.csv -> name for people.
DECIDERS = {"vae": "VAE bank", "prototype": "nearest class mean"}
_BLOCK_FIELDS: dict[str, tuple[type, ...]] = {
    "activations": (list,),
    "probes": (int,),
    "threshold": (int, float),
    "margin": (int, float),
    "probed": (int,),
    "added": (int,),
}


@dataclass(frozen=True, slots=True)
class TaskParameters:
    """Parameters trained in one task, and adapter parameters stored after it."""

    task: str
    trainable: int
    stored: int


@dataclass(frozen=True, slots=True)
class BlockExpansion:
    """One block's decision: the most active probe against the limit, and the number of experts added.

    `balance` is the share of experts and probes in use, from 1 / count (one takes all) to 1 (all equally active); None
    where the activations are no shares of tokens (mean logits may be negative). `activations` are of the experts, then
    of the `probes` probes.
    """

    probe: float
    limit: float
    added: int
    balance: float | None
    activations: tuple[float, ...]
    probes: int


@dataclass(frozen=True, slots=True)
class TaskExpansion:
    """The decisions of one task by block name; none for a task that was not probed."""

    task: str
    blocks: dict[str, BlockExpansion]


@dataclass(frozen=True, slots=True)
class BlockUsage:
    """How one block's router shared its weight among the experts on the data of `task`, right after its training."""

    task: str
    block: str
    shares: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Located:
    """After training task `after`, `decider` took `count` test questions of `task` for questions of `located`."""

    after: str
    decider: str
    task: str
    located: str
    count: int


def read_parameters(path: Path, order: Sequence[str]) -> tuple[TaskParameters, ...]:
    """Read `parameters.csv`; its rows must be tasks of `order`, in that order."""
    if not path.exists():
        return ()
    rows: list[TaskParameters] = []
    for where, row in read_rows(path, ("task", "trainable", "stored")):
        _check_next(f"{where}, column 'task'", row["task"], [before.task for before in rows], order)
        trainable, stored = whole_number(where, row, "trainable"), whole_number(where, row, "stored")
        rows.append(TaskParameters(row["task"], trainable, stored))
    return tuple(rows)


def read_expansion(path: Path, order: Sequence[str]) -> tuple[TaskExpansion, ...]:
    """Read `expansion.json`; its entries must be tasks of `order`, in that order."""
    if not path.exists():
        return ()
    tasks: list[TaskExpansion] = []
    for number, entry in enumerate(read_json(path, list), start=1):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict):
            raise ClmoeError(f"{where}: expected an object with 'task' and 'blocks', found {type(entry).__name__}")
        check_field(where, entry, "task", (str,))
        check_field(where, entry, "blocks", (dict,))
        _check_next(f"{where}, field 'task'", entry["task"], [before.task for before in tasks], order)
        blocks = {
            name: _read_block(f"{path}, task {entry['task']!r}, block {name!r}", block)
            for name, block in entry["blocks"].items()
        }
        tasks.append(TaskExpansion(entry["task"], blocks))
    return tuple(tasks)


def read_usage(path: Path, order: Sequence[str]) -> tuple[BlockUsage, ...]:
    """Read `usage.csv`; the experts of a block stand in order, counted from 0."""
    if not path.exists():
        return ()
    shares: dict[tuple[str, str], list[float]] = {}
    for where, row in read_rows(path, ("task", "block", "expert", "share")):
        if row["task"] not in order:
            raise ClmoeError(f"{where}, column 'task': {row['task']!r} is none of {', '.join(order)}")
        block = shares.setdefault((row["task"], row["block"]), [])
        if whole_number(where, row, "expert") != len(block):
            raise ClmoeError(f"{where}, column 'expert': expected {len(block)}, found {row['expert']}")
        block.append(share_number(where, row, "share"))
    return tuple(BlockUsage(task, block, tuple(values)) for (task, block), values in shares.items())


def read_located(path: Path, order: Sequence[str]) -> tuple[Located, ...]:
    """Read `locator.csv`; a pair of tasks that is not listed was never confused."""
    if not path.exists():
        return ()
    keys = ("after", "decider", "task", "located")
    rows: dict[tuple[str, ...], Located] = {}
    for where, row in read_rows(path, (*keys, "count")):
        for column in keys:
            known = DECIDERS if column == "decider" else order
            if row[column] not in known:
                raise ClmoeError(f"{where}, column {column!r}: {row[column]!r} is none of {', '.join(known)}")
        key = (row["after"], row["decider"], row["task"], row["located"])
        if key in rows:
            raise ClmoeError(f"{where}: second row for {','.join(key)}; remove one")
        rows[key] = Located(*key, whole_number(where, row, "count"))
    return tuple(rows.values())


def _check_next(where: str, task: str, before: Sequence[str], order: Sequence[str]) -> None:
    """Refuse a task that is unknown, listed twice, or listed after a later one."""
    if task not in order:
        raise ClmoeError(f"{where}: {task!r} is no task of the order in run.json ({', '.join(order)})")
    if before and order.index(task) <= order.index(before[-1]):
        raise ClmoeError(f"{where}: {task!r} comes after {before[-1]!r}; list each task once, in training order")


def _read_block(where: str, block: Any) -> BlockExpansion:
    if not isinstance(block, dict):
        raise ClmoeError(f"{where}: expected an object, found {type(block).__name__}")
    for field, types in _BLOCK_FIELDS.items():
        check_field(where, block, field, types)
        if isinstance(block[field], (int, float)) and not is_number(block[field]):
            raise ClmoeError(f"{where}: field {field!r} is {block[field]!r}; expected a finite number")
    activations, probes = block["activations"], block["probes"]
    if not all(is_number(value) for value in activations):
        raise ClmoeError(f"{where}: field 'activations' must be a list of finite numbers")
    if not 1 <= probes <= len(activations):
        raise ClmoeError(f"{where}: field 'probes' is {probes}; expected 1 to {len(activations)}, one per activation")
    if block["added"] < 0:
        raise ClmoeError(f"{where}: field 'added' is {block['added']}; expected at least 0")
    # A negative threshold is raised to 0 by the rule itself, see clmoe.methods.llava_cmoe.decide.
    return BlockExpansion(
        max(activations[-probes:]),
        max(block["threshold"], 0.0),
        block["added"],
        share_in_use(activations),
        tuple(activations),
        probes,
    )


def share_in_use(activations: Sequence[float]) -> float | None:
    """`exp(entropy) / count` of the activations as a distribution: how many equally used experts would be as spread."""
    total = sum(activations)
    if min(activations) < 0 or total == 0:
        return None
    shares = [value / total for value in activations if value > 0]
    return math.exp(-sum(share * math.log(share) for share in shares)) / len(activations)
