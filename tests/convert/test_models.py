"""Each published format, loaded by us, computes what transformers' own LLaVA with the same weights computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from clmoe.bases.llava import load_base
from clmoe.cli import main
from clmoe.config import ModelConfig
from clmoe.data.images import preprocess
from clmoe.data.prompts import encode_prompt
from tests.convert import sources

OWN_TOWER = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return sources.reference()


@pytest.fixture(scope="module")
def original(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """LLaVA's own names, without a tower."""
    return sources.llama_tensors(model) | sources.projector_tensors(model)


@pytest.fixture(scope="module")
def clip_folder(model: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.clip(tmp_path_factory.mktemp("clip") / "clip", sources.tower_tensors(model, "vision_model."))


def convert(*arguments: object) -> None:
    main(["convert", *map(str, arguments)])


def same_logits(folder: Path, model: LlavaForConditionalGeneration) -> None:
    loaded = load_base(ModelConfig(path=str(folder)))
    torch.testing.assert_close(sources.logits(loaded.model), sources.logits(model), rtol=1e-5, atol=1e-5)
    assert (loaded.tokenizer.image_token_id, loaded.tokenizer.pad_token_id) == (sources.IMAGE, sources.PAD)
    assert loaded.image_token_count == 4


# ---- The three sources


def test_llava_hf_is_loaded_as_it_is(model: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    same_logits(sources.llava_hf(tmp_path / "hf", model), model)


@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
@pytest.mark.parametrize("own_tower", [False, True], ids=["clip", "own"])
def test_liuhaotian(
    kind: str, own_tower: bool, model: LlavaForConditionalGeneration, original: dict[str, Tensor], clip_folder: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Where the checkpoint has a tower, that one counts: here the CLIP folder's is another."""
    tensors, vision = dict(original), clip_folder
    if own_tower:
        tensors |= sources.tower_tensors(model, OWN_TOWER)
        other = {name: torch.randn_like(t) for name, t in sources.tower_tensors(model, "vision_model.").items()}
        vision = sources.clip(tmp_path / "other", other)
    source = sources.liuhaotian(tmp_path / "llava", tensors, model_type=kind)
    convert(source, tmp_path / "out", "--vision", vision)
    told = capsys.readouterr().out
    assert "original LLaVA" in told and ("its own vision tower" if own_tower else f"tower of {clip_folder}") in told
    same_logits(tmp_path / "out", model)


def test_vicuna_clip_and_projector_all_pickled(
    model: LlavaForConditionalGeneration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sources.vicuna(tmp_path / "vicuna", sources.llama_tensors(model), pickled=True)
    vision = sources.clip(tmp_path / "clip", sources.tower_tensors(model, "vision_model."), pickled=True)
    projector = {name: tensor.bfloat16() for name, tensor in sources.projector_tensors(model).items()}
    torch.save(projector, tmp_path / "mm_projector.bin")
    convert(source, tmp_path / "out", "--vision", vision, "--projector", tmp_path / "mm_projector.bin")
    assert "LLaMA" in capsys.readouterr().out
    rounded = sources.reference()
    with torch.no_grad():
        for parameter in rounded.model.multi_modal_projector.parameters():
            parameter.copy_(parameter.bfloat16())
    same_logits(tmp_path / "out", rounded)
    assert not list(tmp_path.glob(".*")), "nothing is left beside the result"


# ---- What is written


def test_the_written_folder(
    model: LlavaForConditionalGeneration, original: dict[str, Tensor], clip_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Shards and index as transformers writes them; every tensor in its own dtype, bit for bit; new rows are means."""
    monkeypatch.setattr("clmoe.convert.shards.SHARD_BYTES", 30_000)
    source = sources.liuhaotian(tmp_path / "llava", original)
    convert(source, tmp_path / "out", "--vision", clip_folder)
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert (
        files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)] and len(files) > 3
    )
    written = {}
    for file in files:
        found = load_file(out / file)
        assert {name for name, where in index.items() if where == file} == found.keys()
        written |= found
    assert len(written) == len(model.state_dict())
    embeddings = original["model.embed_tokens.weight"]
    for name, tensor in (("model.embed_tokens", embeddings), ("lm_head", original["lm_head.weight"])):
        rows = written[f"language_model.{name}.weight"]
        assert rows.shape == (sources.ROWS, sources.WIDTH) and rows.dtype == torch.float16
        assert torch.equal(rows[: sources.VOCABULARY], tensor)
        mean = tensor.double().mean(0).half()
        assert torch.equal(rows[sources.VOCABULARY :], mean.expand(sources.ROWS - sources.VOCABULARY, -1))
    again = LlavaForConditionalGeneration.from_pretrained(out)
    assert again.dtype == torch.float16 and again.generation_config.pad_token_id == sources.PAD
    assert again.generation_config.do_sample is not True


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500_000.0}},
    ],
    ids=["transformers 4", "transformers 5"],
)
def test_the_rotary_embedding_is_the_sources(
    rope: dict[str, Any], original: dict[str, Tensor], clip_folder: Path, tmp_path: Path
) -> None:
    source = sources.liuhaotian(tmp_path / "llava", original, **rope)
    convert(source, tmp_path / "out", "--vision", clip_folder)
    written = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").config.text_config.rope_parameters
    assert (written["rope_theta"], written["rope_type"], written["factor"]) == (500_000.0, "linear", 2.0)


def test_the_written_folder_reads_prompts_and_pictures(
    original: dict[str, Tensor], clip_folder: Path, tmp_path: Path
) -> None:
    from PIL import Image

    convert(sources.liuhaotian(tmp_path / "llava", original), tmp_path / "out", "--vision", clip_folder)
    base = load_base(ModelConfig(path=str(tmp_path / "out")))
    ids = encode_prompt("What animal is it?", True, base.tokenizer, base.image_token_count)
    assert ids.count(sources.IMAGE) == base.image_token_count and ids[0] == 1
    pixels = preprocess(Image.new("RGB", (40, 30), (255, 0, 0)), base.image_processor)
    assert pixels.shape == (3, sources.SIDE, sources.SIDE)
    expected = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(sources.MEAN)) / torch.tensor(sources.STD)
    torch.testing.assert_close(pixels[:, sources.SIDE // 2, sources.SIDE // 2], expected, rtol=1e-5, atol=1e-5)


def test_a_converted_model_trains_and_evaluates(
    original: dict[str, Tensor], clip_folder: Path, mini_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(sources.liuhaotian(tmp_path / "llava", original), tmp_path / "out", "--vision", clip_folder)
    arguments = ["--config", "moelora", "--benchmark", mini_yaml, "--task", "colour", "--model", tmp_path / "out"]
    overrides = ["--output", tmp_path / "run" / "01-colour", "--then-eval", "training.steps=2", "evaluation.limit=2"]
    main([str(part) for part in ["train", *arguments, *overrides]])
    assert "trained" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "width", "ffn", "blocks"), [("7b", 4096, 11008, 32), ("13b", 5120, 13824, 40)])
def test_real_configurations_become_llava_hfs(name: str, width: int, ffn: int, blocks: int) -> None:
    """Vicuna's config.json and the tower that LLaVA-1.5 names, without weights, against the shipped configurations."""
    from types import SimpleNamespace

    from clmoe.convert.clip import known_tower
    from clmoe.convert.llava_folder import Connection, Language, llava_config
    from clmoe.utils.paths import repository_root

    heads = width // 128
    real = sources.LLAMA | {
        "hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": heads, "max_position_embeddings": 4096, "vocab_size": 32000,
    }  # fmt: skip
    fields = {name: value for name, value in real.items() if name not in ("torch_dtype", "pad_token_id", "use_cache")}
    fields = {name: fields[name] for name in fields if name not in ("transformers_version", "tie_word_embeddings")}
    tokenizer: Any = SimpleNamespace(image_token_id=32000, pad_token_id=32001)
    tower = known_tower("openai/clip-vit-large-patch14-336")
    made = llava_config(Language(fields, tokenizer, "float16"), tower, Connection()).to_dict()
    shipped = json.loads((repository_root() / f"configs/models/llava-1.5-{name}.config.json").read_text())
    assert made["text_config"].pop("pad_token_id") == shipped.pop("pad_token_id")
    for part in ("text_config", "vision_config"):
        wanted = shipped.pop(part)
        assert {key: made[part][key] for key in wanted} == wanted
    assert {key: made[key] for key in shipped} == shipped
    assert (tower.side, tower.patch) == (336, 14)


# ---- What is refused


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        convert(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("drop", "add", "problem"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "lacks 1 tensors, model.layers.1.mlp.up_proj.weight first"),
        ("model.mm_projector.2.bias", None, "lacks 1 tensors, model.mm_projector.2.bias first"),
        ("lm_head.weight", None, "lacks 1 tensors, lm_head.weight first"),
        (None, "model.layers.2.mlp.up_proj.weight", "1 tensors that this format does not have, model.layers.2.mlp"),
        (None, "model.image_newline", "does not have, model.image_newline first"),
        (None, OWN_TOWER + "pre_layrnorm.weight", rf"lacks \d+ tensors, {OWN_TOWER}embeddings.class_embedding first"),
    ],
)
def test_a_missing_or_unknown_tensor_is_named(
    drop: str | None, add: str | None, problem: str, original: dict[str, Tensor], clip_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import re

    from clmoe.convert.shards import ShardWriter

    tensors = {name: tensor for name, tensor in original.items() if name != drop}
    tensors |= {add: torch.zeros(2).half()} if add else {}
    source = sources.liuhaotian(tmp_path / "llava", tensors)
    monkeypatch.setattr(ShardWriter, "add", lambda *a: pytest.fail("a tensor was copied"))
    told = refused(capsys, source, tmp_path / "out", "--vision", clip_folder)
    assert re.search(problem, told) and str(source) in told
    assert not list(tmp_path.glob("*out*")) + list(tmp_path.glob(".*"))


def test_an_index_that_lies_is_found_out(
    original: dict[str, Tensor], clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sources.liuhaotian(tmp_path / "llava", original, pickled=True)
    shard = source / "pytorch_model-00002-of-00002.bin"
    content = torch.load(shard, weights_only=True)
    dropped = sorted(name for name in content if "inv_freq" not in name)[0]
    del content[dropped]
    torch.save(content, shard)
    assert f"lacks 1 tensors, {dropped} first" in refused(capsys, source, tmp_path / "out", "--vision", clip_folder)
    shard.unlink()
    assert f"names {shard.name}, which is not there" in refused(capsys, source, tmp_path / "o", "--vision", clip_folder)
    assert not list(tmp_path.glob("*out*")) + list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("model.norm.weight", torch.zeros(7).half(), "model.norm.weight: shape [7], the model needs [48]"),
        ("model.norm.weight", torch.zeros(48).long(), "torch.int64 is no weight"),
        ("lm_head.weight", torch.zeros(401, 48).half(), "shape [401, 48], but config.json says vocab_size 400"),
    ],
)
def test_a_tensor_of_another_kind_is_named(
    name: str, tensor: Tensor, problem: str, original: dict[str, Tensor], clip_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = sources.liuhaotian(tmp_path / "llava", original | {name: tensor})
    assert problem in refused(capsys, source, tmp_path / "out", "--vision", clip_folder)
    assert not list(tmp_path.glob("*out*")) + list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'; LLaVA-1.5 has 'mlp2x_gelu'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'; LLaVA-1.5 has 'pad'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ({"vocab_size": 399}, "vocab_size 399: they do not belong together"),
        ({"hidden_size": None}, "hidden_size is None, expected a number"),
        ({"model_type": "mistral"}, "model_type 'mistral' in its config.json; expected an original LLaVA"),
        ({"text_config": {}}, "in transformers' format already"),
    ],
)
def test_another_kind_of_model_is_refused(
    changes: dict[str, Any], problem: str, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sources.liuhaotian(tmp_path / "llava", {"a": torch.zeros(1)}, **changes)
    assert problem in refused(capsys, source, tmp_path / "out", "--vision", clip_folder)


def test_options_that_do_not_fit(
    original: dict[str, Tensor], clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llava = sources.liuhaotian(tmp_path / "llava", original)
    vicuna = sources.vicuna(tmp_path / "vicuna", {"a": torch.zeros(1)})
    binary = tmp_path / "mm_projector.bin"
    binary.write_bytes(b"x")
    assert "leave out --projector" in refused(capsys, llava, tmp_path / "out", "--projector", binary)
    assert "alone: give --vision" in refused(capsys, vicuna, tmp_path / "out", "--projector", binary)
    assert "alone: give --projector" in refused(capsys, vicuna, tmp_path / "out", "--vision", clip_folder)
    assert "holds no vision tower: give the folder of openai/clip" in refused(capsys, llava, tmp_path / "out")
    assert "exists: choose another" in refused(capsys, llava, clip_folder, "--vision", clip_folder)
    told = refused(capsys, vicuna, tmp_path / "out", "--vision", llava, "--projector", binary)
    assert "model_type 'llava', not 'clip'" in told
    assert "no such folder" in refused(capsys, tmp_path / "nowhere", tmp_path / "out")
    assert "neither config.json nor adapter_config.json" in refused(capsys, tmp_path, tmp_path / "out")


def test_a_hostile_projector_runs_nothing(
    model: LlavaForConditionalGeneration, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.convert.test_pickles import Canary

    torch.save({"model.mm_projector.0.weight": Canary(tmp_path / "sang")}, tmp_path / "mm_projector.bin")
    source = sources.vicuna(tmp_path / "vicuna", sources.llama_tensors(model))
    binary = tmp_path / "mm_projector.bin"
    told = refused(capsys, source, tmp_path / "out", "--vision", clip_folder, "--projector", binary)
    assert "mm_projector.bin: refused: it asks for" in told
    assert not (tmp_path / "sang").exists() and not (tmp_path / "out").exists()


# ---- transformers' format, as it is loaded


@pytest.mark.parametrize(
    ("drop", "add", "problem"),
    [
        ("language_model.lm_head.weight", None, r"lack 1 tensors, lm_head\.weight first"),
        (None, "language_model.model.layers.9.mlp.up_proj.weight", r"hold, beyond the model's, 1 tensors, .*layers\.9"),
        (None, "vision_tower.extra", r"beyond the model's, 1 tensors, .*extra"),
        (None, "multi_modal_projector.linear_1.bias", r"linear_1\.bias has shape \[3\] .* makes it \[48\]"),
    ],
)
def test_a_missing_or_extra_key_of_a_native_folder_is_named(
    drop: str | None, add: str | None, problem: str, model: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    from clmoe.errors import ClmoeError

    folder = sources.llava_hf(tmp_path / "hf", model)
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    for file in [*folder.glob("model-*"), folder / "model.safetensors.index.json"]:
        file.unlink()
    tensors.pop(drop or "", None)
    save_file(tensors | ({add: torch.zeros(3)} if add else {}), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ClmoeError, match=problem):
        load_base(ModelConfig(path=str(folder)))
