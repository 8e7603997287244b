"""Loading a base, the names of its parts, and its identity."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration
from transformers.quantizers.quantizers_utils import should_convert_module

from clmoe.bases.inputs import to_device
from clmoe.bases.llava import (
    PROJECTOR,
    LoadedBase,
    _four_bit,
    base_fingerprint,
    block_of,
    count_image_tokens,
    decoder_layers,
    language_model_pattern,
    load_base,
    meta_base,
    projector_of,
    vision_tower_of,
)
from clmoe.config import ModelConfig
from clmoe.errors import ClmoeError
from tests import support

QUESTIONS = ("How many things are there?", "On which side is it, left or right?", "Which colour?")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A base of the test's own, free to be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "base"))


# ---- Loading


def test_a_loaded_base_is_frozen_and_in_evaluation_mode(pristine_base: LoadedBase, tiny_folder: Path) -> None:
    model = pristine_base.model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert pristine_base.fingerprint == base_fingerprint(str(tiny_folder))
    assert model.name_or_path == str(tiny_folder)
    assert pristine_base.tokenizer.image_token_id == model.config.image_token_id


@pytest.mark.parametrize(("dtype", "attention"), [("bfloat16", "sdpa"), ("bfloat16", "eager"), ("float16", "sdpa")])
def test_dtype_and_attention_are_as_configured(
    dtype: str, attention: str, tiny_folder: Path, pristine_base: LoadedBase
) -> None:
    base = load_base(ModelConfig(path=str(tiny_folder), dtype=dtype, attention=attention))  # type: ignore[arg-type]
    assert {parameter.dtype for parameter in base.model.parameters()} == {getattr(torch, dtype)} == {base.dtype}
    assert base.model.get_decoder().config._attn_implementation == attention
    batch = support.prompt_batch(pristine_base, QUESTIONS)
    wanted = pristine_base.model(**batch).logits[:, -1]
    assert (base.model(**to_device(batch, base)).logits[:, -1].float() - wanted).norm() / wanted.norm() < 0.1


def test_what_is_not_installed_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(flash_attn: bool, bitsandbytes: bool) -> None:
        monkeypatch.setattr("clmoe.bases.llava.is_flash_attn_2_available", lambda: flash_attn)
        monkeypatch.setattr("clmoe.bases.llava.find_spec", lambda name: object() if bitsandbytes else None)

    flash = ModelConfig(path=str(tmp_path / "none"), dtype="bfloat16", attention="flash_attention_2")
    four = ModelConfig(path=str(tmp_path / "none"), load_in_4bit=True)
    given(False, False)
    with pytest.raises(ClmoeError, match=r"clmoe\[flash"):
        load_base(flash)
    with pytest.raises(ClmoeError, match=r"clmoe\[4bit"):
        load_base(four, "cuda")
    given(True, True)
    with pytest.raises(ClmoeError, match=r"model\.dtype"):
        load_base(dataclasses.replace(flash, dtype="float32"))
    with pytest.raises(ClmoeError, match=str(tmp_path / "none")):
        load_base(flash)
    with pytest.raises(ClmoeError, match=r"model\.load_in_4bit"):
        load_base(four)


def test_4_bits_are_for_the_language_models_blocks_only(pristine_base: LoadedBase) -> None:
    """By transformers' own rule: which linears would be replaced. Loading itself needs a GPU."""
    skipped = _four_bit(ModelConfig(load_in_4bit=True), "cuda")["quantization_config"].llm_int8_skip_modules
    linears = [name for name, module in pristine_base.model.named_modules() if isinstance(module, torch.nn.Linear)]
    converted = {name for name in linears if should_convert_module(name, skipped)}
    assert converted == {name for name in linears if ".language_model.layers." in name}


@pytest.mark.parametrize("kind", ["llama", "no-such-model", None])
def test_a_folder_of_another_model_is_refused_at_once(kind: str | None, folder: Path) -> None:
    """transformers would build a random LLaVA of the default size, 7B, for it."""
    (folder / "config.json").write_text(json.dumps({"model_type": kind} if kind else {}))
    never = mock.patch.object(LlavaForConditionalGeneration, "__init__", side_effect=AssertionError("built"))
    with never, pytest.raises(ClmoeError, match=f"{folder} cannot be loaded"):
        load_base(ModelConfig(path=str(folder)))


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        ("language_model.model.layers.1.mlp.up_proj.weight", None, r"lack.*layers\.1\.mlp\.up_proj\.weight"),
        ("language_model.model.layers.9.mlp.up_proj.weight", [3], r"hold, beyond.*layers\.9"),
        ("multi_modal_projector.linear_1.bias", [3], r"linear_1\.bias .*\[3\].*\[48\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_not_drawn_at_random(
    name: str, shape: list[int] | None, named: str, folder: Path
) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop(name, None)
    save_file(tensors | ({} if shape is None else {name: torch.zeros(shape)}), weights, metadata={"format": "pt"})
    with pytest.raises(ClmoeError, match=named):
        load_base(ModelConfig(path=str(folder)))
    weights.unlink()
    with pytest.raises(ClmoeError, match=str(folder)):
        load_base(ModelConfig(path=str(folder)))


def test_image_tokens_are_the_patches_and_with_full_the_class_token(tiny_base: LoadedBase) -> None:
    patches = (support.SIZES.image_size // support.SIZES.patch_size) ** 2
    assert tiny_base.image_token_count == count_image_tokens(tiny_base.model) == patches == 4
    features = tiny_base.model.get_image_features(pixel_values=support.pixels(1)).pooler_output
    assert features[0].shape[0] == patches
    tiny_base.model.config.vision_feature_select_strategy = "full"
    assert count_image_tokens(tiny_base.model) == patches + 1


def test_parts_and_their_names(tiny_base: LoadedBase) -> None:
    model = tiny_base.model
    names = {id(module): name for name, module in model.named_modules()}
    layers = decoder_layers(model)
    assert [block_of(names[id(layer)] + ".") for layer in layers] == ["0", "1"]
    assert names[id(projector_of(model))].endswith(PROJECTOR)
    assert projector_of(model).linear_1.in_features == support.SIZES.vision_hidden
    assert vision_tower_of(model).config.image_size == support.SIZES.image_size
    for wanted in (["mlp"], ["q_proj", "down_proj"]):
        found = {name for name in names.values() if re.fullmatch(language_model_pattern(wanted), name)}
        inside = [f"{names[id(layer)]}.{name}" for layer in layers for name, _ in layer.named_modules()]
        assert found == {name for name in inside if name.rpartition(".")[2] in wanted}


def test_a_base_of_shapes_only(tiny_folder: Path, pristine_base: LoadedBase, tmp_path: Path) -> None:
    shapes = meta_base(tiny_folder / "config.json")
    expected = {name: tensor.shape for name, tensor in pristine_base.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in shapes.model.state_dict().items()} == expected
    assert shapes.device.type == "meta" and shapes.image_token_count == pristine_base.image_token_count
    for text in ('{"model_type": "llama"}', "[]", '{"model_type": "llava", "text_config": {"hidden_size": "x"}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ClmoeError, match=str(tmp_path / "config.json")):
            meta_base(tmp_path / "config.json")


# ---- Identity


@pytest.mark.parametrize("share", [0.0, 0.37, 0.9999999])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_flipped_bit_changes_the_fingerprint(name: str, share: float, tiny_folder: Path, folder: Path) -> None:
    before = base_fingerprint(str(folder))
    assert before == base_fingerprint(str(tiny_folder)), "wherever it lies"
    content = bytearray((folder / name).read_bytes())
    content[int(share * len(content))] ^= 1
    (folder / name).write_bytes(bytes(content))
    assert base_fingerprint(str(folder)) != before


def test_large_files_are_sampled_to_their_last_byte(tmp_path: Path) -> None:
    """Sparse files of more than sixteen samples: both ends and the samples count, and so does the size."""
    (tmp_path / "config.json").write_text("{}")
    prints = set()
    for size, position in ((20 << 20, None), (20 << 20, 0), (20 << 20, (20 << 20) - 1), ((20 << 20) + 1, None)):
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.truncate(size)
            if position is not None:
                file.seek(position)
                file.write(b"\x01")
        prints.add(base_fingerprint(str(tmp_path)))
    assert len(prints) == 4
