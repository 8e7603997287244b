"""The configuration of the LoRA-expert adapter, and its member of peft's enum of methods."""

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from clmoe.bases.families import DECODER
from clmoe.bases.llava import language_model_pattern
from clmoe.config import FFN_PROJECTIONS

PEFT_NAME = "clmoe"


# Add a member to peft's enum, which offers no public way to do this.
MEMBER = PEFT_NAME.upper()
CLMOE = str.__new__(PeftType, MEMBER)
CLMOE._name_ = CLMOE._value_ = MEMBER
PeftType._member_names_.append(MEMBER)
PeftType._member_map_[MEMBER] = PeftType._value2member_map_[MEMBER] = CLMOE
type.__setattr__(PeftType, MEMBER, CLMOE)


@dataclass
class ExpertConfig(PeftConfig):
    """Shape of a LoRA-expert adapter; enough to rebuild it exactly, however much it has grown.

    Attributes:
        rank: rank of **one** expert.
        scaling: the factor ``s`` of the mixture.
        dropout: one mask per linear, shared by its experts.
        as_released: as in ``AdapterConfig``; one mask per expert. Written only if it is set, as there.
        projections: the linears that carry experts.
        router_scope: ``per_linear`` (each linear has its own router) or ``per_block`` (one router per FFN).
        router_top_k: experts kept per token; None keeps all.
        layout: block -> owner task of each expert, oldest first.
        router_owners: owner task of each instance router, oldest first; a router spans no newer task's experts.
        pick: without routers: the ``sum`` of all experts, or those of the ``task`` in ``RouteSelection.router``.
        pick_from: the first block in which ``pick`` holds; in the blocks before it, all experts are added up.
        frozen_before: experts and routers of owners below this are frozen.
        task_gates: number of rows of the task routers.
        instruction_width: width of an instruction's embedding if the experts are two halves with a gate each (SMoLoRA);
            else 0, and not written.
        prompts: the soft prompts' ``length``, the ``width`` of a prototype, the ``picks`` that share a prompt, and the
            number of ``tasks``; None without soft prompts, and not written. Without ``layout`` there are no experts.
        guide: widths of the embeddings and of the keys that weight the tasks (ProgLoRA); else None, and not written.
        seed: seed of the initial weights.
        modules_to_save: the projector's modules when it is tuned.
        decoder: the base's module that holds the blocks; written only if it is not LLaVA's.
    """

    rank: int = 8
    scaling: float = 1.0
    dropout: float = 0.0
    as_released: bool = False
    projections: list[str] = field(default_factory=lambda: list(FFN_PROJECTIONS))
    router_scope: str = "per_linear"
    router_top_k: int | None = None
    layout: dict[str, list[int]] = field(default_factory=dict)
    router_owners: list[int] = field(default_factory=lambda: [0])
    pick: str = "sum"
    pick_from: int = 0
    frozen_before: int = 0
    task_gates: int = 0
    instruction_width: int = 0
    guide: list[int] | None = None
    prompts: dict[str, int] | None = None
    seed: int = 0
    modules_to_save: list[str] | None = None
    decoder: str = DECODER
    target_modules: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = CLMOE
        for name, known in (("router_scope", ("per_linear", "per_block")), ("pick", ("sum", "task"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {known}")
        picking = {frozenset(owners) for block, owners in self.layout.items() if int(block) >= self.pick_from}
        if self.pick == "task" and (self.router_owners or len(picking) > 1):
            raise ValueError("pick: 'task' needs router_owners=[] and experts of every owner in every block that picks")
        names = ["mlp"] if self.router_scope == "per_block" else self.projections
        wanted = [language_model_pattern(names, self.decoder)] if self.layout or self.prompts is None else []
        wanted += [rf".*{self.decoder}\.embed_tokens"] if self.prompts is not None else []
        self.target_modules = "|".join(wanted)

    def to_dict(self) -> dict[str, Any]:
        unwritten: dict[str, Any] = {"as_released": False, "pick_from": 0, "instruction_width": 0, "decoder": DECODER}
        unwritten |= {"guide": None, "prompts": None}
        return {n: v for n, v in super().to_dict().items() if n not in unwritten or v != unwritten[n]}

    @property
    def needs_routing(self) -> bool:
        """Several tasks share the checkpoint, so a task must be chosen for each sample."""
        owners = {owner for block in self.layout.values() for owner in block}
        prompted = self.prompts is not None and self.prompts["tasks"] > 1
        return (
            len(self.router_owners) > 1 or self.task_gates > 1 or (self.pick == "task" and len(owners) > 1) or prompted
        )
