"""Each published format, loaded by us, computes what transformers' own LLaVA computes with the same weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import sentencepiece
import torch
from safetensors.torch import load_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, normalizers
from torch import Tensor
from transformers import AutoProcessor, LlamaTokenizer, LlavaForConditionalGeneration

from clmoe.bases.llava import LoadedBase, load_base
from clmoe.bases.pieces import PROBES, repaired
from clmoe.cli import main
from clmoe.config import ModelConfig
from clmoe.convert import weights
from clmoe.convert.weights import llava_config, read_tower
from clmoe.errors import ClmoeError
from clmoe.utils.paths import shipped_root
from tests.convert import sources
from tests.llama_vocabulary import write_llama_pieces

OWN_TOWER = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return sources.reference()


@pytest.fixture(scope="module")
def clip_folder(model: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.clip(tmp_path_factory.mktemp("clip") / "clip", sources.tower_tensors(model, "vision_model."))


class Workshop:
    """Makes sources in one folder and converts them to ``out``."""

    def __init__(
        self, folder: Path, model: LlavaForConditionalGeneration, vision: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.folder, self.vision, self.out, self.capsys = folder, vision, folder / "out", capsys
        self.tensors = sources.llama_tensors(model) | sources.projector_tensors(model)
        self.options: list[object] = ["--vision", vision]

    def llava(self, tensors: dict[str, Tensor] | None = None, **options: Any) -> Path:
        return sources.liuhaotian(self.folder / "llava", self.tensors if tensors is None else tensors, **options)

    def convert(self, source: Path, *options: object) -> Path:
        main(["convert", *map(str, [source, self.out, *(options or self.options)])])
        return self.out

    def load(self, source: Path) -> LoadedBase:
        return load_base(ModelConfig(path=str(self.convert(source))))

    def refused(self, source: Path, *options: object) -> str:
        """The message of a refused conversion, which must leave nothing behind."""
        with pytest.raises(SystemExit) as stop:
            self.convert(source, *options)
        assert stop.value.code == 2 and self.nothing_written()
        return self.capsys.readouterr().err

    def nothing_written(self) -> bool:
        return not list(self.folder.glob("*out*")) + list(self.folder.glob(".*"))


@pytest.fixture
def workshop(
    tmp_path: Path, model: LlavaForConditionalGeneration, clip_folder: Path, capsys: pytest.CaptureFixture[str]
) -> Workshop:
    return Workshop(tmp_path, model, clip_folder, capsys)


def same_logits(folder: Path, model: LlavaForConditionalGeneration) -> None:
    """Assert that the folder, loaded by us, computes what the reference computes."""
    loaded = load_base(ModelConfig(path=str(folder)))
    torch.testing.assert_close(sources.logits(loaded.model), sources.logits(model), rtol=1e-5, atol=1e-5)
    assert (loaded.tokenizer.image_token_id, loaded.tokenizer.pad_token_id) == (sources.IMAGE, sources.PAD)
    assert loaded.image_token_count == 4


# ---- The three sources


@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
@pytest.mark.parametrize("own_tower", [False, True], ids=["clip", "own"])
def test_liuhaotian(
    kind: str, own_tower: bool, model: LlavaForConditionalGeneration, workshop: Workshop, tmp_path: Path
) -> None:
    """A tower in the checkpoint takes precedence over the CLIP folder's, which then has other weights here."""
    tensors = workshop.tensors
    if own_tower:
        tensors = tensors | sources.tower_tensors(model, OWN_TOWER)
        other = {name: torch.randn_like(t) for name, t in sources.tower_tensors(model, "vision_model.").items()}
        workshop.options = ["--vision", sources.clip(tmp_path / "other", other)]
    same_logits(workshop.convert(workshop.llava(tensors, model_type=kind)), model)


def test_vicuna_clip_and_projector_all_pickled(
    model: LlavaForConditionalGeneration, workshop: Workshop, tmp_path: Path
) -> None:
    source = sources.vicuna(tmp_path / "vicuna", sources.llama_tensors(model), pickled=True)
    vision = sources.clip(tmp_path / "clip", sources.tower_tensors(model, "vision_model."), pickled=True)
    projector = {name: tensor.bfloat16() for name, tensor in sources.projector_tensors(model).items()}
    torch.save(projector, tmp_path / "mm_projector.bin")
    out = workshop.convert(source, "--vision", vision, "--projector", tmp_path / "mm_projector.bin")
    rounded = sources.reference()
    with torch.no_grad():
        for parameter in rounded.model.multi_modal_projector.parameters():
            parameter.copy_(parameter.bfloat16())
    same_logits(out, rounded)
    assert not list(tmp_path.glob(".*")), "nothing is left beside the result"


# ---- What is written


def test_the_written_folder(
    model: LlavaForConditionalGeneration, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards match their index; the rows of both vocabularies keep dtype and bits, and new rows are means."""
    monkeypatch.setattr(weights, "SHARD_SIZE", 30_000)
    out = workshop.convert(workshop.llava())
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    parts = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    assert {name: file for file, part in parts.items() for name in part} == index and len(parts) > 3
    written = {name: tensor for part in parts.values() for name, tensor in part.items()}
    assert len(written) == len(model.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows, tensor = written[f"language_model.{name}"], workshop.tensors[name]
        assert rows.shape == (sources.ROWS, sources.WIDTH) and rows.dtype == torch.float16
        assert torch.equal(rows[: sources.VOCABULARY], tensor)
        mean = tensor.double().mean(0).half()
        assert torch.equal(rows[sources.VOCABULARY :], mean.expand(sources.ROWS - sources.VOCABULARY, -1))
    again = LlavaForConditionalGeneration.from_pretrained(out)
    assert again.dtype == torch.float16 and again.generation_config.pad_token_id == sources.PAD
    assert again.generation_config.do_sample is not True
    images = AutoProcessor.from_pretrained(out).image_processor
    assert (list(images.image_mean), list(images.image_std)) == (sources.MEAN, sources.STD)
    assert dict(images.crop_size) == {"height": sources.SIDE, "width": sources.SIDE}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500_000.0}},
    ],
    ids=["transformers 4", "transformers 5"],
)
def test_the_rotary_embedding_is_the_sources(rope: dict[str, Any], workshop: Workshop) -> None:
    out = workshop.convert(workshop.llava(**rope))
    written = LlavaForConditionalGeneration.from_pretrained(out).config.text_config.rope_parameters
    assert (written["rope_theta"], written["rope_type"], written["factor"]) == (500_000.0, "linear", 2.0)


@pytest.mark.parametrize(("name", "width", "ffn", "blocks"), [("7b", 4096, 11008, 32), ("13b", 5120, 13824, 40)])
def test_real_configurations_become_llava_hfs(name: str, width: int, ffn: int, blocks: int, tmp_path: Path) -> None:
    """Vicuna's config.json and openai's CLIP, without weights, must give the shipped configurations."""
    heads = width // 128
    real = sources.LLAMA | sources.LLAVA | {
        "hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": heads, "max_position_embeddings": 4096, "vocab_size": 32000,
    }  # fmt: skip
    tower, _ = read_tower(sources.clip_configuration(tmp_path, sources.VIT_L_336))
    made = llava_config(real, tower, real, (32000, 32001)).to_dict()
    shipped = json.loads((shipped_root() / f"configs/models/llava-1.5-{name}.config.json").read_text())
    assert made["text_config"].pop("pad_token_id") == shipped.pop("pad_token_id")
    for part in ("text_config", "vision_config"):
        wanted = shipped.pop(part)
        assert {key: made[part][key] for key in wanted} == wanted
    assert {key: made[key] for key in shipped} == shipped


# ---- The tokenizer

TEXTS = ["Hi  Hello", "a   box      red         a", "12 34,5", "\n\nWhat  \n is\tit", "naïve 狗 🐕 “two”", "What?"]


def test_ids_are_sentencepieces(workshop: Workshop) -> None:
    """Oracle: SentencePiece. As in LLaMA's vocabulary, runs of blanks are early pieces but are merged last."""
    source = workshop.llava()
    file, proto = source / "tokenizer.model", sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(file.read_bytes())
    for number, length in ((301, 2), (302, 4), (303, 3), (304, 8)):
        proto.pieces[number].piece, proto.pieces[number].score = "▁" * length, -1e9
    file.write_bytes(proto.SerializeToString())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    expected = [[1, *pieces.encode(text)] for text in TEXTS]
    assert workshop.load(source).tokenizer(TEXTS)["input_ids"] == expected
    theirs = LlamaTokenizer.from_pretrained(source)(TEXTS)["input_ids"]
    assert theirs != expected, "transformers reads tokenizer.model right by now: simplify read_tokenizer"
    # the folder as another converter leaves it: without tokenizer.json, or with one that transformers made
    (workshop.out / "tokenizer.json").unlink()
    shutil.copy(file, workshop.out)
    base = ModelConfig(path=str(workshop.out))
    opened = load_base(base).tokenizer
    assert opened(TEXTS)["input_ids"] == expected and opened.image_token_id == sources.IMAGE
    LlamaTokenizer.from_pretrained(workshop.out).save_pretrained(workshop.out)
    with pytest.raises(ClmoeError, match=r"out: .*the original .*tokenizer\.json"):
        load_base(base)
    (workshop.out / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ClmoeError, match=r"out/tokenizer\.model"):
        load_base(base)


def test_llamas_own_vocabulary_keeps_sentencepieces_ids(tmp_path: Path) -> None:
    folder = write_llama_pieces(tmp_path)
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    assert tokenizer("Hi  Hello")["input_ids"] == [1, 6324, 259, 10994]
    tokenizer = repaired(tokenizer, folder, 32_000)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer("Hi  Hello")["input_ids"] == [1, 6324, 29871, 15043] == [1, *pieces.encode("Hi  Hello")]
    assert [tokenizer(text)["input_ids"] for text in PROBES] == [[1, *pieces.encode(text)] for text in PROBES]


@pytest.mark.parametrize("lower", [False, True], ids=["kept", "refused"])
def test_a_tokenizer_json_keeps_its_ids_or_is_refused(lower: bool, workshop: Workshop) -> None:
    source = workshop.llava()
    LlamaTokenizer.from_pretrained(source).save_pretrained(source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings.pop("extra_special_tokens", None)  # transformers 5.0 writes it
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "tokenizer.model").unlink()
    original = Tokenizer.from_file(str(source / "tokenizer.json"))
    if lower:  # transformers' LlamaTokenizer would drop the normalizer
        original.normalizer = normalizers.Lowercase()
        original.save(str(source / "tokenizer.json"))
        assert "the original gives [" in workshop.refused(source)
    else:
        tokenizer = workshop.load(source).tokenizer
        assert [tokenizer(text)["input_ids"] for text in TEXTS] == [original.encode(text).ids for text in TEXTS]


# ---- What is refused


@pytest.mark.parametrize(
    ("drop", "add", "named"),
    [
        ("model.layers.1.mlp.up_proj.weight", {}, "lacks model.layers.1.mlp.up_proj.weight"),
        ("model.mm_projector.2.bias", {}, "lacks model.mm_projector.2.bias"),
        (None, {"model.layers.2.mlp.up_proj.weight": torch.zeros(2).half()}, "model.layers.2.mlp.up_proj.weight"),
        (None, {OWN_TOWER + "pre_layrnorm.weight": torch.zeros(2).half()}, f"lacks {OWN_TOWER}embeddings.class_emb"),
        (None, {"model.norm.weight": torch.zeros(48).long()}, "model.norm.weight is torch.int64"),
        (None, {"lm_head.weight": torch.zeros(401, 48).half()}, "lm_head.weight has shape [401, 48]"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_before_any_is_copied(
    drop: str | None, add: dict[str, Tensor], named: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = workshop.llava({name: tensor for name, tensor in workshop.tensors.items() if name != drop} | add)
    monkeypatch.setattr(weights, "write_weights", lambda *a: pytest.fail("a tensor was copied"))
    told = workshop.refused(source)
    assert named in told and str(source) in told


def test_shards_that_do_not_make_one_model_are_refused(workshop: Workshop) -> None:
    source = workshop.llava(pickled=True)
    shard = source / "pytorch_model-00002-of-00002.bin"
    content = torch.load(shard, weights_only=True)
    moved = sorted(name for name in content if "inv_freq" not in name)[0]
    torch.save({name: tensor for name, tensor in content.items() if name != moved}, shard)  # the index still lists it
    assert f"lacks {moved}" in workshop.refused(source)
    first = "model.embed_tokens.weight"
    torch.save(content | {first: workshop.tensors[first]}, shard)
    assert f"{first} is in another file" in workshop.refused(source)
    shard.unlink()
    assert f"{shard}: no such file" in workshop.refused(source)
    (source / "pytorch_model.bin.index.json").write_text('{"weight_map": 3}')
    assert "index.json" in workshop.refused(source)


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_while_copying_leaves_nothing(
    failure: BaseException, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, write, written = workshop.llava(), safetensors.torch.save_file, []

    def fail_second(*arguments: Any, **options: Any) -> None:
        if written:
            raise failure
        written.append(write(*arguments, **options))

    monkeypatch.setattr(weights, "SHARD_SIZE", 30_000)
    monkeypatch.setattr(safetensors.torch, "save_file", fail_second)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        workshop.convert(source)
    assert written and workshop.nothing_written()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        ({"vocab_size": 399}, "vocab_size 399"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"text_config": {}}, "in transformers' format already"),
    ],
)
def test_another_kind_of_model_is_refused(changes: dict[str, Any], named: str, workshop: Workshop) -> None:
    assert named in workshop.refused(workshop.llava({"a": torch.zeros(1)}, **changes))


def test_options_that_do_not_fit(workshop: Workshop, tmp_path: Path) -> None:
    llava, vicuna = workshop.llava(), sources.vicuna(tmp_path / "vicuna", {"a": torch.zeros(1)})
    vision, projector = ["--vision", workshop.vision], ["--projector", tmp_path / "mm_projector.bin"]
    for source, given, named in (
        (llava, [*vision, *projector], "leave out --projector"),
        (llava, ["--tasks", "a"], "give --vision"),
        (vicuna, projector, "give --vision"),
        (vicuna, vision, "give --projector"),
        (vicuna, [*vision, *projector], "mm_projector.bin: no such file"),
        (llava, ["--vision", llava], "model_type is 'llava'"),
        (tmp_path / "nowhere", vision, "nowhere/config.json"),
    ):
        assert named in workshop.refused(source, *given)
    workshop.out = workshop.vision
    with pytest.raises(SystemExit):
        workshop.convert(llava)
    assert f"{workshop.vision} exists" in workshop.capsys.readouterr().err
