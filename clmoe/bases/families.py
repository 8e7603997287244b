"""The families of bases: for each ``model_type`` of transformers, where its parts are and what its processor makes.

docs/add-a-base.md shows how to add a row. Nothing else in the package is specific to a family, except that LLaVA-1.5
keeps the prompt of its paper (``vicuna_v1``), shared prefixes, and cached vision features.
"""

from dataclasses import dataclass, replace

DECODER = "language_model"
PROJECTOR = "multi_modal_projector"
MASKED = {"token_type_ids", "image_grid_thw"}
"""Inputs with which a right-padded batch needs its attention mask: token types make attention bidirectional, and old
versions of transformers take an image's own positions for packed sequences."""


@dataclass(frozen=True)
class Family:
    """Names are those of modules inside ``model``.

    Attributes:
        decoder: what holds the decoder's ``layers``.
        vision: the image encoder.
        projector: what maps its features to token embeddings; each one of a list of modules.
        inputs: what the processor makes for the model besides ``input_ids``, ``attention_mask`` and ``pixel_values``.
        vicuna: the prompt is LLaVA-1.5's own, and images are padded to a square as there.
        template: a chat template in Jinja that replaces the processor's.
        tail: what the processor puts after every text with an image.
        typed_answers: ``token_type_ids`` are 1 from the first answer on (attention is bidirectional before it).
        needs: a package that the processor needs besides those of clmoe.
        assumed: if there is no processor to ask, the tokens, patches and tiles of an image of 640 x 480 pixels, as
            transformers' processor makes them with the published models' settings.
    """

    decoder: str = DECODER
    vision: str = "vision_tower"
    projector: tuple[str, ...] = (PROJECTOR,)
    inputs: tuple[str, ...] = ()
    vicuna: bool = False
    template: str = ""
    tail: str = ""
    typed_answers: bool = False
    needs: str = ""
    assumed: tuple[int, int, int] | None = None


_QWEN = Family(
    vision="visual",
    projector=("visual.merger",),
    inputs=("image_grid_thw", "mm_token_type_ids"),
    assumed=(391, 1564, 1),
)
_IDEFICS = Family(
    decoder="text_model",
    vision="vision_model",
    projector=("connector",),
    inputs=("pixel_attention_mask",),
    assumed=(2197, 8788, 13),
)
# As transformers' conversion script writes it; the hub's file ends its prompt differently than it begins an answer.
_ONEVISION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{{ '<image>\n' if c.type == 'image' else "
    "c.text }}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = {
    "llava": Family(vicuna=True),
    "llava_next": Family(inputs=("image_sizes",), assumed=(2341, 2880, 5)),
    "llava_onevision": Family(inputs=("image_sizes", "batch_num_images"), template=_ONEVISION, assumed=(2929, 3645, 5)),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": replace(_QWEN, projector=("visual.merger", "visual.deepstack_merger_list"), assumed=(300, 1200, 1)),
    "internvl": Family(assumed=(3328, 13312, 13)),
    "smolvlm": replace(_IDEFICS, needs="num2words", assumed=(1053, 9477, 13)),
    "idefics3": _IDEFICS,
    "gemma3": Family(inputs=("token_type_ids",), assumed=(256, 4096, 1)),
}
LLAVA = FAMILIES["llava"]


def family_of(model_type: object) -> Family:
    """Raises ValueError for a ``model_type`` that has no row."""
    if model_type not in FAMILIES:
        convert = "; clmoe convert turns it into a llava" if model_type in ("llava_llama", "llama") else ""
        known = f"clmoe knows {', '.join(FAMILIES)}"
        raise ValueError(
            f"model_type {model_type!r} in its config.json: {known}; docs/add-a-base.md shows how to add one{convert}"
        )
    return FAMILIES[str(model_type)]
