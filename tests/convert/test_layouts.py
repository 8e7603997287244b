"""The published folders with their own names, files and settings are read correctly, and bad tensors are named.

Oracle: transformers' own classes, which load a LLaMA and a CLIP, each from its own folder.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clmoe.bases.llava import load_base, meta_base
from clmoe.cli import main
from clmoe.config import ModelConfig
from clmoe.convert import weights
from clmoe.errors import ClmoeError
from clmoe.utils.paths import shipped_root
from tests.convert import layouts

pytestmark = pytest.mark.slow


class Parts(NamedTuple):
    """The three parts' tensors, and the logits that transformers computes with them."""

    llama: dict[str, Tensor]
    projector: dict[str, Tensor]
    clip: dict[str, Tensor]
    logits: Tensor

    @property
    def llava(self) -> dict[str, Tensor]:
        return self.llama | {name: tensor.half() for name, tensor in self.projector.items()}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    llama = layouts.numbers(layouts.LLAMA_KEYS, torch.float16, 1)
    projector = layouts.numbers(layouts.PROJECTOR_KEYS, torch.bfloat16, 2)
    clip = layouts.numbers(layouts.CLIP_KEYS, torch.float32, 3)
    folder = tmp_path_factory.mktemp("parts")
    language = layouts.vicuna(folder / "vicuna", llama, pickled=False)
    vision = layouts.clip(folder / "clip", clip, pickled=False)
    return Parts(llama, projector, clip, layouts.logits_of_parts(language, vision, projector))


def convert(kind: str, folder: Path, parts: Parts, pickled: bool, damage: Callable[[Path], None] | None = None) -> Path:
    """Make the source, damage it and convert it; llava-hf's folder needs no conversion."""
    if kind == "llava-hf":
        source = layouts.llava_hf(folder / kind, parts.llama | parts.projector | parts.clip)
        if damage:
            damage(folder)
        return source
    vision = layouts.clip(folder / "clip", parts.clip, pickled)
    given = ["--vision", str(vision)]
    if kind == "vicuna":
        source = layouts.vicuna(folder / kind, parts.llama, pickled)
        given += ["--projector", str(layouts.pretrained_projector(folder / "projector", parts.projector))]
    else:
        source = layouts.liuhaotian(folder / kind, parts.llava, pickled)
    if damage:
        damage(folder)
    main(["convert", str(source), str(folder / "out"), *given])
    return folder / "out"


CASES = [("llava-hf", False), *((kind, pickled) for kind in ("vicuna", "liuhaotian") for pickled in (False, True))]


@pytest.mark.parametrize(("kind", "pickled"), CASES)
def test_a_published_folder_computes_what_transformers_computes(
    kind: str, pickled: bool, parts: Parts, tmp_path: Path
) -> None:
    loaded = load_base(ModelConfig(path=str(convert(kind, tmp_path, parts, pickled))))
    inputs = layouts.batch()
    with torch.no_grad():
        found = loaded.model(**inputs).logits[..., : layouts.VOCABULARY] * inputs["attention_mask"][..., None]
    torch.testing.assert_close(found, parts.logits, rtol=1e-5, atol=1e-5)
    assert parts.logits.std() > 0.5 and loaded.image_token_count == layouts.TOKENS
    tokens = loaded.tokenizer
    assert (tokens.image_token_id, tokens.pad_token_id) == (layouts.IMAGE, layouts.PAD)
    assert tokens("Hi  Hello")["input_ids"] == [1, 6324, 29871, 15043], "as SentencePiece reads LLaMA's own pieces"


@pytest.mark.parametrize(("name", "sizes"), [("7b", layouts.SEVEN), ("13b", layouts.THIRTEEN)])
def test_names_and_shapes_are_the_whole_models(name: str, sizes: layouts.Sizes) -> None:
    """With all layers, no tensor is missing, surplus or of another shape than in the shipped configuration."""
    state = meta_base(shipped_root() / f"configs/models/llava-1.5-{name}.config.json").model.state_dict()
    ours = weights.renamed(state, {there: here for here, there in weights.IN_MEMORY.items()})
    wanted = {here: tuple(state[there].shape) for here, there in ours.items()}
    keys = layouts.LLAMA_KEYS | layouts.PROJECTOR_KEYS | layouts.CLIP_KEYS
    published = layouts.shapes(keys, sizes)
    hub = {layouts.hf_name(name): shape for name, shape in published.items() if layouts.hf_name(name)}
    for widened in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        hub[widened] = (layouts.ROWS, *hub[widened][1:])
    assert hub == wanted
    read = weights.renamed(wanted, weights.LLAMA | weights.PROJECTOR | weights.CLIP).keys()
    assert read == {name for name in published if layouts.hf_name(name)}
    assert all(weights.LEFT_OUT.search(name) for name in published.keys() - read)


UP, HEAD, FIRST = "model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"
POST, BIAS = "vision_model.post_layernorm.weight", "model.mm_projector.2.bias"
UNKNOWN, EXTRA = "model.layers.2.mlp.up_proj.weight", torch.zeros(2).half()


def edit(files: str, without: str = "", also: str = "") -> Callable[[Path], None]:
    """Drop a tensor from the file that holds it, or add one to the last file."""

    def apply(folder: Path) -> None:
        paths = sorted(folder.glob(files))
        for path in paths:
            tensors = torch.load(path, weights_only=True) if path.suffix == ".bin" else load_file(path)
            tensors.pop(without, None)
            tensors |= {also: EXTRA} if also and path == paths[-1] else {}
            torch.save(tensors, path) if path.suffix == ".bin" else save_file(tensors, path, metadata={"format": "pt"})

    return apply


SHARDS = [
    (kind, f"{kind}/*model-*.{end}", change, problem)
    for kind in ("vicuna", "liuhaotian")
    for end in ("bin", "safetensors")
    for change, problem in (
        ({"without": UP}, f"lacks {UP}"),
        ({"also": UNKNOWN}, f"should not hold {UNKNOWN}"),
        ({"also": FIRST}, f"{FIRST} is in another file"),
    )
]


@pytest.mark.parametrize(
    ("kind", "files", "change", "problem"),
    [
        *SHARDS,
        ("liuhaotian", "liuhaotian/*model-*.bin", {"without": BIAS}, f"lacks {BIAS}"),
        ("vicuna", "projector/*.bin", {"without": BIAS}, f"lacks {BIAS}"),
        ("vicuna", "projector/*.bin", {"also": FIRST}, f"should not hold {FIRST}"),
        ("vicuna", "clip/*.bin", {"without": POST}, f"lacks {POST}"),
        (
            "vicuna",
            "clip/*.safetensors",
            {"also": "vision_model.head.weight"},
            "should not hold vision_model.head.weight",
        ),
    ],
)
def test_a_missing_surplus_or_doubled_tensor_is_named(
    kind: str,
    files: str,
    change: dict[str, str],
    problem: str,
    parts: Parts,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        convert(kind, tmp_path, parts, files.endswith(".bin"), edit(files, **change))
    told = capsys.readouterr().err
    assert stop.value.code == 2 and problem in told and str(tmp_path / files.split("/")[0]) in told
    assert not list(tmp_path.glob("*out*")) + list(tmp_path.glob(".*")), "nothing is left behind"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"without": HEAD}, HEAD),
        ({"also": UNKNOWN}, UNKNOWN),
        ({"also": FIRST}, f"model-00003-of-00003.*{FIRST} is in another file"),
    ],
)
def test_llava_hfs_folder_is_checked_too(change: dict[str, str], problem: str, parts: Parts, tmp_path: Path) -> None:
    named = {key: f"language_model.{name}" for key, name in change.items()}
    folder = convert("llava-hf", tmp_path, parts, False, edit("llava-hf/*.safetensors", **named))
    with pytest.raises(ClmoeError, match=problem):
        load_base(ModelConfig(path=str(folder)))
