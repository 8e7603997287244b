"""Memory of one process that trains an adapter on a frozen LLaVA: pure functions of shapes, all in bytes.

Names in the formulas: ``b`` bytes of the base's dtype, ``N`` tokens of a micro-batch (samples times tokens per sample),
``D`` hidden size, ``F`` FFN size, ``H`` heads, ``Q`` = H times head size, ``E`` experts of rank ``r``, ``R`` = E r.

*Kept* is what autograd holds from the forward to the backward pass. It was derived from the code of
``clmoe/model``, transformers' LLaMA and peft's LoRA, operation by operation, and is compared in
``tests/system/test_memory.py`` with the tensors that autograd really saves. A frozen linear keeps nothing: its
backward needs only its weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

FLOAT32 = 4
INT64 = 8
ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
# bitsandbytes' nf4 with double quantisation: half a byte for a weight, for each block of 64 its maximum in one byte,
# and for each 256 of those a float32 maximum
FOUR_BIT = 0.5 + (1 + FLOAT32 / 256) / 64


@dataclass(frozen=True)
class LlavaShapes:
    """Sizes of a LLaVA.

    Attributes:
        hidden, ffn, heads, kv_heads, head_size, blocks, vocabulary: of the language model.
        vision_hidden, vision_layers: of the vision tower.
        image_tokens, patches: of one image in the language model and (class token included) in the tower.
    """

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int
    blocks: int
    vocabulary: int
    vision_hidden: int
    vision_layers: int
    image_tokens: int
    patches: int

    def linear(self, name: str) -> tuple[int, int]:
        """``(din, dout)`` of a decoder block's linear."""
        D, F, Q, K = self.hidden, self.ffn, self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q_proj": (D, Q),
            "k_proj": (D, K),
            "v_proj": (D, K),
            "o_proj": (Q, D),
            "gate_proj": (D, F),
            "up_proj": (D, F),
            "down_proj": (F, D),
        }[name]


@dataclass(frozen=True)
class Attached:
    """What every decoder block carries.

    Attributes:
        kind: ``lora`` (peft's own), or experts with a router ``per_linear`` or ``per_block``.
        targets: the adapted linears.
        experts, rank: number of experts and rank of each; plain LoRA is one expert.
        top_k: the gate keeps the largest ones only, which stores their order.
        balance: the routers have a balance loss.
        dropout: on the adapter's input.
        grown: older experts are frozen and new ones train, so that both are joined in every forward pass.
        projector: the projector trains too.
    """

    kind: Literal["lora", "per_linear", "per_block"]
    targets: tuple[str, ...]
    experts: int
    rank: int
    top_k: bool = False
    balance: bool = False
    dropout: bool = False
    grown: bool = False
    projector: bool = False


@dataclass(frozen=True)
class Micro:
    """One forward pass of one process.

    Attributes:
        samples: records in it, each with one image.
        tokens: of each sample, image and padding included.
        answer_tokens: of each sample: those with logits.
        dtype_bytes: ``b``, of the base.
        attention: its implementation; ``eager`` keeps ``[H, T, T]`` probabilities.
        device: PyTorch's fused dropout on GPUs keeps one byte per element, on the CPU a whole number.
    """

    samples: int
    tokens: int
    answer_tokens: int
    dtype_bytes: int
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def all_tokens(self) -> int:
        return self.samples * self.tokens


def norm_kept(width: int) -> int:
    """Per token: RMSNorm's float32 input and reciprocal deviation, ``4 D + 4``."""
    return FLOAT32 * width + FLOAT32


def attention_kept(shapes: LlavaShapes, micro: Micro) -> int:
    """Per token: rotated q and k, v, the output, ``4 b Q``, and the log-sum of each head, ``4 H``.

    Keys and values count once per head, as transformers repeats them. sdpa also keeps the padding mask in the
    base's dtype, ``b T``; a batch of one has none. ``eager`` keeps no output but the probabilities, in float32
    and, if that differs, in the base's dtype.
    """
    b, Q, T = micro.dtype_bytes, shapes.heads * shapes.head_size, micro.tokens
    if micro.attention == "eager":
        return 3 * b * Q + shapes.heads * T * (FLOAT32 + (b if b < FLOAT32 else 0))
    mask = b * T if micro.attention == "sdpa" and micro.samples > 1 else 0
    return 4 * b * Q + FLOAT32 * shapes.heads + mask


def ffn_kept(shapes: LlavaShapes, attached: Attached, b: int, upstream: bool) -> int:
    """Per token: the activation's input and the two factors of the product, ``3 b F``.

    ``upstream``: gradients flow further back than this FFN. Without it only what an adapted linear needs is kept.
    """
    gate = upstream or "gate_proj" in attached.targets or _product_made_again(attached)
    up = upstream or "up_proj" in attached.targets
    return b * shapes.ffn * ((2 if gate else 0) + (1 if up else 0))


def _product_made_again(attached: Attached) -> bool:
    """down_proj's experts need its input, the SwiGLU product, and make it again from the two factors."""
    return attached.kind == "per_block" and not attached.dropout and "down_proj" in attached.targets


def router_kept(attached: Attached) -> int:
    """Per token: the gate, ``4 E``; with top-k the order of the experts; with a balance loss two more softmaxes."""
    return attached.experts * (FLOAT32 + (INT64 if attached.top_k else 0) + (2 * FLOAT32 if attached.balance else 0))


def adapter_kept(shapes: LlavaShapes, attached: Attached, micro: Micro) -> int:
    """Per token and block: inputs of the adapted linears, rank-sized products and gates.

    * An input that several linears and routers share (the norm's output) is kept once, ``b din``; attention's output
      is kept anyway. On a base of two bytes peft's LoRA keeps a float32 copy of it per linear instead.
    * Routers per block leave the FFN's product to be made again from its two factors, which are kept anyway.
    * With dropout every linear keeps an input of its own, and its mask.
    * Experts keep ``A x``, ``b R``, and the gate once more; LoRA ``4 r``.
    """
    b, half = micro.dtype_bytes, micro.dtype_bytes < FLOAT32
    own = FLOAT32 if attached.kind == "lora" else b  # bytes of an element that the product with A keeps
    shared: dict[str, int] = {}
    total = 0
    for name in attached.targets:
        din, _ = shapes.linear(name)
        if attached.dropout:
            total += din * (own + (1 if micro.device == "cuda" else own))
        elif attached.kind == "lora" and half:
            total += FLOAT32 * din
        else:
            shared[_input(name)] = b * din
        if attached.kind == "lora":
            total += FLOAT32 * attached.rank
            continue
        total += b * attached.experts * attached.rank + b * attached.experts
        if attached.kind == "per_linear":
            total += router_kept(attached)
            shared[_input(name)] = b * din
    if attached.kind == "per_block":
        total += router_kept(attached)
        shared["norm2"] = b * shapes.hidden
    if _product_made_again(attached):
        shared.pop("product")
    if micro.attention != "eager":
        shared.pop("attention", None)
    return total + sum(shared.values())


def _input(linear: str) -> str:
    """Linears of equal answer read the same tensor."""
    if linear in ("q_proj", "k_proj", "v_proj"):
        return "norm1"
    return {"o_proj": "attention", "down_proj": "product"}.get(linear, "norm2")


def weight_copies(shapes: LlavaShapes, attached: Attached, b: int) -> int:
    """Per block, whatever the tokens: experts cast to the base's dtype, or frozen and new ones joined."""
    if attached.kind == "lora" or (b == FLOAT32 and not attached.grown):
        return 0
    return b * attached.experts * attached.rank * sum(sum(shapes.linear(name)) for name in attached.targets)


def block_kept(shapes: LlavaShapes, attached: Attached, micro: Micro, upstream: bool = True) -> int:
    """One decoder block's tensors.

    ``upstream`` is False for the first block under a frozen projector: nothing before its first adapted linear
    needs a gradient, so that its norms and attention may keep nothing.
    """
    inner = upstream or any(name in ATTENTION_LINEARS for name in attached.targets)
    mixed = upstream or any(name in ATTENTION_LINEARS[:3] for name in attached.targets)
    per_token = adapter_kept(shapes, attached, micro) + ffn_kept(shapes, attached, micro.dtype_bytes, inner)
    per_token += norm_kept(shapes.hidden) * (upstream + inner)
    if mixed:
        per_token += attention_kept(shapes, micro)
    elif "o_proj" in attached.targets and attached.kind != "lora" and not attached.dropout:
        per_token += micro.dtype_bytes * shapes.heads * shapes.head_size  # its input, which attention does not keep
    return micro.all_tokens * per_token + weight_copies(shapes, attached, micro.dtype_bytes)


def projector_kept(shapes: LlavaShapes, attached: Attached, micro: Micro) -> int:
    """A trained projector's inputs, per image token: ``b (V + 2 D)`` with the tower's width ``V``.

    On a base of two bytes besides its two matrices, cast: ``b (V D + D^2)``, whatever the tokens.
    """
    if not attached.projector:
        return 0
    b, V, D = micro.dtype_bytes, shapes.vision_hidden, shapes.hidden
    cast = b * (V * D + D * D) if b < FLOAT32 else 0
    return cast + micro.samples * shapes.image_tokens * b * (V + 2 * D)


def norm_at_the_end(shapes: LlavaShapes, micro: Micro) -> int:
    """Kept by the last norm."""
    return micro.all_tokens * norm_kept(shapes.hidden)


def logits(shapes: LlavaShapes, micro: Micro, bytes_each: int) -> int:
    """The trainer computes logits at the answer tokens only: that many times ``V`` numbers."""
    return micro.samples * micro.answer_tokens * shapes.vocabulary * bytes_each


def blocks_kept(shapes: LlavaShapes, attached: Attached, micro: Micro, recompute: bool) -> int:
    """All that is kept of the blocks, and of the projector, when the forward pass has ended.

    With recomputation: every block's input and the text's embeddings, ``b D`` per token each, the padding mask once,
    the balance loss, which is computed outside, and the outputs of tower and projector, which the checkpoints refer to.
    """
    b, N = micro.dtype_bytes, micro.all_tokens
    shared = 2 * b * micro.tokens * shapes.head_size + projector_kept(shapes, attached, micro)  # the former: RoPE
    if not recompute:
        first = block_kept(shapes, attached, micro, upstream=attached.projector)
        return shared + first + (shapes.blocks - 1) * block_kept(shapes, attached, micro)
    mask = N * micro.tokens * (b if micro.attention == "eager" else 1) if micro.samples > 1 else 0
    balance = 2 * FLOAT32 * attached.experts * shapes.blocks * N if attached.balance else 0
    inputs = (shapes.blocks + 1) * b * shapes.hidden * N
    images = 0 if attached.projector else micro.samples * shapes.image_tokens * b * shapes.hidden
    return shared + inputs + mask + balance + images + vision_pass(shapes, micro)


def all_kept(shapes: LlavaShapes, attached: Attached, micro: Micro, recompute: bool = False) -> int:
    """What the backward pass finds: blocks, last norm, and float32 log-probabilities of the answers, ``4 V`` each."""
    blocks = blocks_kept(shapes, attached, micro, recompute)
    return blocks + norm_at_the_end(shapes, micro) + logits(shapes, micro, FLOAT32)


def activation_peak(shapes: LlavaShapes, attached: Attached, micro: Micro, recompute: bool) -> int:
    """The most that is alive at once in a forward and a backward pass, besides weights and gradients.

    The largest of four moments: the tower's pass; the loss, with the logits in both types and their gradient; the
    last norm's backward, which makes five float32 tensors of width ``D``; the last block's backward, with all that
    it keeps (recomputed or not) and, as measured, about two FFN-wide tensors more, four where the product
    is made again; on a base of two bytes besides one of float32 for down_proj's own router, or three of float32 in
    all where peft's LoRA adds its float32 update.
    """
    b, N = micro.dtype_bytes, micro.all_tokens
    held, end = blocks_kept(shapes, attached, micro, recompute), norm_at_the_end(shapes, micro)
    half = b < FLOAT32
    routed = attached.kind == "per_linear" and "down_proj" in attached.targets
    wide = (4 if _product_made_again(attached) else 2) * b + (FLOAT32 if half and routed else 0)
    if attached.kind == "lora" and half:
        wide = 3 * FLOAT32
    block = block_kept(shapes, attached, micro) if recompute else 0
    return max(
        vision_pass(shapes, micro),
        held + end + logits(shapes, micro, b + 3 * FLOAT32),
        held + end + 5 * FLOAT32 * shapes.hidden * N,
        held + block + wide * shapes.ffn * N,
    )


def vision_pass(shapes: LlavaShapes, micro: Micro) -> int:
    """While the tower runs, before anything is kept: all its layers' outputs, as transformers collects them."""
    layers = shapes.vision_layers + 1
    return micro.samples * shapes.patches * micro.dtype_bytes * shapes.vision_hidden * layers


@dataclass(frozen=True)
class Sharding:
    """How training state is spread over processes.

    Attributes:
        gpus: processes, one per GPU.
        stage: of ZeRO; None without DeepSpeed (DDP if there are several processes).
        offload: ZeRO keeps masters, moments and gradients in the host's memory.
        bucket: elements of ZeRO's reduction buffers, all together.
        prefetch: elements that ZeRO-3 gathers ahead of their use.
    """

    gpus: int = 1
    stage: int | None = None
    offload: bool = False
    bucket: int = 0
    prefetch: int = 0


@dataclass(frozen=True)
class Tensors:
    """Numbers and bytes of what a training holds.

    Attributes:
        base: bytes of the frozen base.
        frozen: bytes of frozen experts and routers (float32 buffers, never spread).
        trainable: number of parameters that train.
        trainable_bytes: of them, in the types they are kept in.
        largest_block: bytes of one decoder block of the base, which ZeRO-3 gathers.
    """

    base: int
    frozen: int
    trainable: int
    trainable_bytes: int
    largest_block: int


@dataclass(frozen=True)
class State:
    """Bytes that one process holds through the whole training: by name on its GPU, and in the host's memory."""

    gpu: dict[str, int] = field(default_factory=dict)
    host: int = 0

    @property
    def total(self) -> int:
        return sum(self.gpu.values())


def training_state(held: Tensors, how: Sharding) -> State:
    """Weights, gradients, optimizer.

    * Without DeepSpeed AdamW keeps two moments in the parameters' types; DDP copies the gradients into buckets.
    * ZeRO-2 keeps the weights whole; float32 masters, two moments and the gradients are cut over the processes.
      Two moments and a master are ``12 P / gpus`` bytes. Its reduction buckets are float32.
    * ZeRO-3 cuts the weights too, and gathers one block and ``prefetch`` elements at a time. Weights that are float32
      serve as masters themselves.
    * Offloading moves masters, moments and gradients to the host: ``16 P / gpus``.
    """
    P, g = held.trainable, how.gpus
    whole = how.stage != 3
    gpu = {
        "base weights": held.base if whole else _share(held.base, g),
        "adapter weights": held.frozen + (held.trainable_bytes if whole else _share(held.trainable_bytes, g)),
    }
    if how.stage is None:
        gpu |= {"gradients": held.trainable_bytes, "optimizer": 2 * held.trainable_bytes}
        gpu["communication"] = held.trainable_bytes if g > 1 else 0
        return State(gpu)
    own_masters = not whole and not how.offload and held.trainable_bytes == FLOAT32 * P
    cut = {
        "gradients": _share(FLOAT32 * P, g) if how.stage >= 2 else FLOAT32 * P,
        "optimizer": _share((2 if own_masters else 3) * FLOAT32 * P, g),
    }
    gpu |= dict.fromkeys(cut, 0) if how.offload else cut
    gathered = 0 if whole else held.largest_block + how.prefetch * FLOAT32
    gpu["communication"] = how.bucket * FLOAT32 + gathered
    return State(gpu, sum(cut.values()) if how.offload else 0)


def _share(size: int, processes: int) -> int:
    return -(-size // processes)


def four_bit(weights: Iterable[int]) -> int:
    """Bytes of linears with that many weights each, quantised to nf4 in blocks of 64 with double quantisation."""
    return round(sum(weights) * FOUR_BIT)
