"""The two kinds of adapter that methods start from, built from the shared ``adapter`` section of a config."""

from typing import TYPE_CHECKING

from clmoe.config import AdapterConfig, Config

if TYPE_CHECKING:
    from peft import LoraConfig

    from clmoe.model.adapter import ExpertConfig
    from clmoe.model.llava import LoadedBase


def saved_modules(adapter: AdapterConfig) -> list[str] | None:
    """peft's ``modules_to_save``: the projector when it is trained."""
    from clmoe.model.adapter import PROJECTOR

    return [PROJECTOR] if adapter.train_projector else None


def lora_scaling(adapter: AdapterConfig) -> float:
    """``alpha / rank``, or the effective scale itself: plain LoRA has no gate."""
    return adapter.alpha / adapter.rank if adapter.scale is None else adapter.scale


def lora_adapter(config: Config) -> "LoraConfig":
    """peft's own LoRA on the language model; the checkpoint loads in stock peft."""
    from peft import LoraConfig

    from clmoe.model.adapter import language_model_pattern

    adapter = config.adapter
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=lora_scaling(adapter) * adapter.rank,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=language_model_pattern(adapter.targets),
        modules_to_save=saved_modules(adapter),
    )


def mean_gate(adapter: AdapterConfig) -> float:
    """The gate an expert gets on average where it gets one: 1/E when all mix, 1/k when ``k < E`` are kept."""
    return 1 / min(adapter.router_top_k or adapter.experts, adapter.experts)


def expert_scaling(adapter: AdapterConfig) -> float:
    """``s``: ``alpha / rank`` with ``rank`` counted as ``rank_is`` says, or what gives the wanted effective scale."""
    return adapter.alpha / adapter.rank if adapter.scale is None else adapter.scale / mean_gate(adapter)


def expert_rank(adapter: AdapterConfig) -> int:
    """Rank of one expert.

    Raises:
        ClmoeError: a total rank that the number of experts does not divide.
    """
    from clmoe.errors import ClmoeError

    if adapter.rank_is == "per_expert":
        return adapter.rank
    if adapter.rank % adapter.experts:
        raise ClmoeError(f"adapter.rank {adapter.rank} (total) is not a multiple of adapter.experts {adapter.experts}")
    return adapter.rank // adapter.experts


def expert_adapter(config: Config, base: "LoadedBase", owner: int = 0) -> "ExpertConfig":
    """``experts`` LoRA experts of task ``owner``, with one instance router per linear or block."""
    from clmoe.model.adapter import ExpertConfig

    adapter = config.adapter
    blocks = len(base.model.model.language_model.layers)
    return ExpertConfig(
        rank=expert_rank(adapter),
        scaling=expert_scaling(adapter),
        dropout=adapter.dropout,
        projections=list(adapter.targets),
        router_scope=adapter.router_scope,
        router_top_k=adapter.router_top_k,
        layout={str(block): [owner] * adapter.experts for block in range(blocks)},
        router_owners=[owner],
        frozen_before=owner,
        seed=config.seed,
        modules_to_save=saved_modules(adapter),
    )
