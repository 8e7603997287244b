"""What every family of bases owes its users: one contract, checked on a tiny random base of each.

``scripts/bases_page.py`` runs it and writes the table of docs/bases.md from what passes. With CLMOE_EVERY_PAIR=1 in the
environment, which that script sets, every method and every locator is tried on every family. Without it, most of them
are divided among the families.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import clmoe
from clmoe.bases.families import FAMILIES
from clmoe.bases.inputs import AnswersFit, to_device
from clmoe.bases.llava import SOFT, LoadedBase, decoder_layers, load_base, open_encoder, projector_names
from clmoe.config import LocatorConfig, ModelConfig, load_config
from clmoe.data.batches import PromptItem, collate_prompts, collate_train
from clmoe.data.prompts import IGNORE
from clmoe.data.records import Question, TrainRecord, Turn
from clmoe.data.rows import END
from clmoe.errors import ClmoeError
from clmoe.evaluate.answer import Answerer
from clmoe.experts.forward import (
    FeatureStore,
    adapted_base,
    answer_states,
    base_features,
    blank_image,
    enable_checkpointing,
    prefill,
)
from clmoe.experts.layer import expert_layers
from clmoe.experts.model import attach_adapter, detach_adapter, load_adapter
from clmoe.experts.prompts import soft_prompts
from clmoe.experts.routing import NEWEST_ROUTER, routing
from clmoe.locators import LOCATORS, make_locator
from clmoe.methods import method_class, methods
from clmoe.train.loop import PROJECTOR, TrainedModel
from clmoe.utils.tensors import same_bits
from tests.bases import tiny_families
from tests.methods.test_contract import ROWS
from tests.runs import FAST, LLAVA_CMOE, Killed, Runs, contents, on_step, tensors
from tests.support import copy_base, save_tiny, tiny_config

NAMES = list(FAMILIES)
EVERY = bool(os.environ.get("CLMOE_EVERY_PAIR"))
# An adapted linear is the same in all families; adapted blocks differ in the activation, which is SiLU or not.
GRAPHS = [("llava", "per_linear"), ("llava", "per_block"), ("gemma3", "per_block")]
GRAPHS = [(name, scope) for name in NAMES for scope in ("per_linear", "per_block")] if EVERY else GRAPHS
TURNS = (Turn("How many things are there?", "two"), Turn("Are you sure?", "yes, quite"))
SIZES = ((32, 24), (20, 60), (90, 40))  # different enough to become different numbers of tokens
QUESTIONS = ("How many?", "On which side is it, left or right?", "Which colour is it?", "Are you sure?")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedBase]:
    """Loads a family's tiny base, once; tests must not change it."""

    @cache
    def base(name: str) -> LoadedBase:
        folder = tmp_path_factory.mktemp(name)
        save_tiny(folder) if name == "llava" else tiny_families.save_family(name, folder)
        return load_base(ModelConfig(path=str(folder)))

    return base


@pytest.fixture(params=NAMES)
def base(request: pytest.FixtureRequest, bases: Callable[[str], LoadedBase]) -> LoadedBase:
    return bases(request.param)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of noise pictures ``0.png``, ``1.png``, ..."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, (width, height) in enumerate(SIZES):
        noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.byte().numpy()).save(folder / f"{number}.png")
    return folder


def items(base: LoadedBase, pictures: Path) -> list[PromptItem]:
    """The prompts of one question about each picture and of one without a picture."""
    names = [*(f"{number}.png" for number in range(len(SIZES))), None]
    asked = [Question(text, name, text, "", {}) for text, name in zip(QUESTIONS, names, strict=True)]
    return [base.prompt_item(q, None if q.image is None else base.read_image(pictures / q.image)) for q in asked]


def batched(base: LoadedBase, prompts: list[PromptItem]) -> dict[str, Tensor]:
    return collate_prompts(prompts, base.tokenizer.pad_token_id)


@pytest.mark.parametrize("name", ["internvl", "gemma3"])
def test_a_processor_with_other_settings_makes_other_inputs(
    name: str, bases: Callable[[str], LoadedBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of cached results depend on the processor's settings; here, an image takes more tokens."""
    encoder = bases(name).encoder
    made_by, key = encoder.made_by, AnswersFit(encoder, 64).key
    monkeypatch.setattr(encoder.chat.processor, "image_seq_length", 9)  # type: ignore[union-attr]
    assert encoder.made_by != made_by and AnswersFit(encoder, 64).key != key


# ---- Adapters


@pytest.mark.parametrize("method", ["lora", "clmoe", "llava_cmoe"])
def test_adapters_are_on_exactly_the_decoders_ffns(method: str, base: LoadedBase, pictures: Path) -> None:
    """A fresh adapter leaves all logits unchanged, bit for bit; apart from the adapter, only the projector trains."""
    own = copy_base(base)
    inside = {id(module) for layer in decoder_layers(own.model) for module in layer.modules()}
    names = {name for name, module in own.model.named_modules() if id(module) in inside}
    ends = ("mlp",) if method == "llava_cmoe" else ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    expected = {name for name in names if name.endswith(ends)}
    assert len(expected) == len(ends) * len(decoder_layers(own.model))
    tuned = method != "llava_cmoe"
    config = tiny_config(method, Path("nowhere"), f"adapter.train_projector={tuned}".lower())
    model = attach_adapter(own.model, method_class(method)(config).adapter(own)).eval()
    patched = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "base_layer")}
    assert patched == expected
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    saved = {name for name in trained if "modules_to_save" in name}
    assert all(any(f".{part}.modules_to_save." in name for part in projector_names(base)) for name in saved)
    whole = sum(
        p.numel() for part in projector_names(base) for p in base.model.get_submodule(f"model.{part}").parameters()
    )
    assert sum(p.numel() for n, p in model.named_parameters() if n in saved) == whole * tuned
    assert all(".mlp." in name for name in trained - saved)
    batch = batched(base, items(base, pictures))
    model.requires_grad_(False)  # torch multiplies by trainable weights in another order, which rounds differently
    with torch.no_grad(), routing(NEWEST_ROUTER):
        assert same_bits(own.model(**batch).logits, base.model(**batch).logits)
    detach_adapter(model)


# ---- Inputs


@pytest.mark.parametrize("base", NAMES[1:], indirect=True)  # tests/data/test_prompts.py covers LLaVA-1.5
@pytest.mark.parametrize("with_image", [True, False])
def test_labels_are_exactly_the_answers_and_their_ends(with_image: bool, base: LoadedBase, pictures: Path) -> None:
    """Oracle: the processor's own tokens of the conversation up to the start and the end of each answer; no offsets."""
    image = base.read_image(pictures / "2.png") if with_image else None
    item = base.train_item(TrainRecord("r", "2.png" if with_image else None, TURNS), image, 4096)
    chat, tail = base.chat, base.family.tail
    messages = []
    for number, turn in enumerate(TURNS):
        said = turn.answer + (chat.end if chat.appended else "")
        asked = [{"type": "image"}] if with_image and not number else []
        messages.append({"role": "user", "content": [*asked, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
    text = base.tokenizer.apply_chat_template(messages, chat_template=chat.template, tokenize=False)

    def tokens(part: str) -> list[int]:
        special = not (base.tokenizer.bos_token and part.startswith(base.tokenizer.bos_token))
        if image is None:
            return base.tokenizer(part, add_special_tokens=special)["input_ids"]
        ids = chat.processor(text=[part.removesuffix(tail)], images=[image], add_special_tokens=special)["input_ids"][0]
        return list(ids) if part.endswith(tail) else list(ids[:-1])

    whole, labels, after = tokens(text), list[int](), 0
    assert item.input_ids[: len(whole)].tolist() == whole
    for turn in TURNS:
        before = text.index(f" {turn.answer}" if f" {turn.answer}" in text else turn.answer, after)
        after = text.index(chat.end, before) + len(chat.end)
        start, stop = len(tokens(text[:before])), len(tokens(text[:after]))
        labels += [IGNORE] * (start - len(labels)) + whole[start:stop]
    assert item.labels.tolist() == labels + [IGNORE] * (len(item.labels) - len(labels))
    answers = base.tokenizer.decode([label for label in labels if label != IGNORE])
    assert answers.replace(" ", "") == "".join(turn.answer + chat.end for turn in TURNS).replace(" ", "")
    prompt = base.prompt_item(Question("q", "2.png" if with_image else None, TURNS[0].question, "", {}), image)
    assert prompt.input_ids.tolist() == whole[: len(prompt.input_ids)]
    assert len(prompt.input_ids) == next(place for place, label in enumerate(labels) if label != IGNORE)


def test_what_a_length_leaves_of_an_answer_is_counted_without_reading_pixels(base: LoadedBase, pictures: Path) -> None:
    records = [TrainRecord(str(n), f"{n}.png", TURNS[:1]) for n in range(3)] + [TrainRecord("t", None, TURNS[:1])]
    for record in records:
        image = None if record.image is None else base.read_image(pictures / record.image)
        item = base.train_item(record, image, 4096)
        answers = (item.labels != IGNORE).tolist()
        for length in (len(answers), len(answers) - 1, answers.index(True) + 1, answers.index(True)):
            fits = AnswersFit(open_encoder(ModelConfig(path=base.model.name_or_path)), length)
            assert fits(record, pictures) == (sum(answers[:length]), sum(answers[length:])), length
            if any(answers[:length]):
                cut = base.train_item(record, image, length)
                assert cut.labels.tolist() == item.labels[:length].tolist()
                assert len(cut.input_ids) == length
            else:
                with pytest.raises(ClmoeError, match=record.id):
                    base.train_item(record, image, length)
        assert AnswersFit(base.encoder, 4096)(record, pictures) == (1, 0)


def test_text_that_holds_a_special_token_is_refused(base: LoadedBase) -> None:
    end = END if base.chat is None else base.chat.end
    for turn in (Turn(f"What {end} is it?", "a"), Turn("What is it?", f"a{end} b")):
        with pytest.raises(ClmoeError, match="record 'odd'"):
            base.train_item(TrainRecord("odd", None, (turn,)), None, 4096)


# ---- Forward passes


def test_a_batch_of_records_is_each_record_alone(base: LoadedBase, pictures: Path) -> None:
    names = ["0.png", None, "1.png", "2.png"]
    found = [
        base.train_item(TrainRecord(str(n), name, TURNS[: 1 + n % 2]), name and base.read_image(pictures / name), 4096)
        for n, name in enumerate(names)
    ]
    pad = base.tokenizer.pad_token_id
    with torch.no_grad():
        whole = answer_states(base.model, collate_train(found, pad))
        alone = torch.cat([answer_states(base.model, collate_train([item], pad)) for item in found])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)


def test_training_reads_what_a_plain_forward_pass_reads(base: LoadedBase, pictures: Path) -> None:
    """Our answer states give the same loss; oracle: the model's own loss on the same labels, image inputs and mask."""
    item = base.train_item(TrainRecord("r", "1.png", TURNS), base.read_image(pictures / "1.png"), 4096)
    batch = collate_train([item], base.tokenizer.pad_token_id)
    with torch.no_grad():
        theirs = base.model(**batch).loss
        logits = base.model.lm_head(answer_states(base.model, batch))
    ours = nn.functional.cross_entropy(logits, item.labels[item.labels != IGNORE])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_soft_token_with_a_words_embedding_is_that_word(base: LoadedBase, pictures: Path) -> None:
    """Oracle: the same records with the words spelled out after their first token."""
    config = load_config("modalprompt", {}, ["options.length=3", "adapter.train_projector=false"])
    words = torch.tensor(base.tokenizer("Which colour is it?", add_special_tokens=False)["input_ids"][-3:])
    pad = base.tokenizer.pad_token_id
    records = [TrainRecord("0", "0.png", TURNS), TrainRecord("1", None, TURNS[:1])]
    prompted, spelled = [], []
    for record in records:
        image = record.image and base.read_image(pictures / record.image)
        item = replace(base, soft_tokens=3).train_item(record, image, 4096)
        plain, soft = base.train_item(record, image, 4096), item.input_ids >= SOFT
        assert torch.equal(item.input_ids[~soft], plain.input_ids) and torch.equal(item.labels[~soft], plain.labels)
        assert soft.nonzero()[:, 0].tolist() == [1, 2, 3] and (item.labels[soft] == IGNORE).all()
        ids = item.input_ids.clone()
        ids[soft] = words
        prompted.append(item)
        spelled.append(replace(item, input_ids=ids))
    with torch.no_grad():
        expected = answer_states(base.model, collate_train(spelled, pad))
        model = attach_adapter(base.model, method_class("modalprompt")(config).adapter(base)).eval()
        layer = soft_prompts(model)
        layer.bank.prompt.copy_(layer.base_layer(words))
        found = answer_states(adapted_base(model), collate_train(prompted, pad))
    detach_adapter(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_answers_are_those_of_generate(base: LoadedBase, pictures: Path) -> None:
    """Oracle: transformers' own generation, one prompt at a time; ours reads all of them in one left-padded batch."""
    prompts = items(base, pictures)
    config = load_config("zero_shot", {}, [], base.model.name_or_path)
    answerer = Answerer(base, base.model, method_class("zero_shot")(config), 0, None)
    texts, _ = answerer.generate(prompts, NEWEST_ROUTER, 12)
    expected = []
    for prompt in prompts:
        batch = batched(base, [prompt])
        made = base.model.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=base.ends)
        expected.append(base.tokenizer.decode(made[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
    assert texts == expected
    assert len(set(expected)) > 2


@pytest.mark.parametrize("which", ["of the template", "of the generation settings"])
def test_an_answer_ends_at_every_end_token(which: str, base: LoadedBase) -> None:
    """The head of the copied base always predicts the end token, so the answer must be empty."""
    own = copy_base(base)
    end = END if base.chat is None else tiny_families.FAMILIES[base.model.config.model_type].end
    ids = [base.tokenizer.convert_tokens_to_ids(end), own.model.generation_config.eos_token_id]
    weight = torch.zeros(len(base.tokenizer), own.model.config.get_text_config().hidden_size)
    own.model.set_output_embeddings(nn.Linear(weight.shape[1], len(weight)))
    own.model.lm_head.weight.data = weight
    own.model.lm_head.bias.data = nn.functional.one_hot(torch.tensor(ids["settings" in which]), len(weight)).float()
    answerer = Answerer(own, own.model, method_class("zero_shot")(load_config("zero_shot", {}, [])), 0, None)
    texts, _ = answerer.generate(
        [own.prompt_item(Question("q", None, "Why?", "", {}), None)], NEWEST_ROUTER, 9, pytest.fail
    )
    assert texts == [""]


def test_a_batch_of_prompts_is_each_prompt_alone(base: LoadedBase, pictures: Path) -> None:
    prompts = items(base, pictures)
    whole = prefill(base.model, batched(base, prompts), NEWEST_ROUTER, 1)
    alone = [prefill(base.model, batched(base, [prompt]), NEWEST_ROUTER, 1) for prompt in prompts]
    torch.testing.assert_close(whole.hidden, torch.cat([one.hidden for one in alone]), rtol=1e-4, atol=1e-5)
    assert whole.next_position.tolist() == [int(one.next_position) for one in alone]
    assert (whole.hidden[0] - whole.hidden[1]).abs().max() > 0.01, "two prompts differ"


# ---- Locators, training, checkpoints


def test_features_for_locators_do_not_depend_on_the_batch(base: LoadedBase, pictures: Path) -> None:
    """Oracle: the model's own hidden states of each prompt alone."""
    own = copy_base(base)
    model = attach_adapter(own.model, method_class("lora")(tiny_config("lora", Path("x"))).adapter(own)).eval()
    prompts = items(base, pictures)
    for kind in ("last", "pooled"):
        found = base_features(model, batched(base, prompts), kind)  # type: ignore[arg-type]
        for row, prompt in enumerate(prompts):
            with torch.no_grad():
                output = base.model.base_model(**batched(base, [prompt]), output_hidden_states=True)
            layers = [states[0, -1] for states in output.hidden_states[1:]]
            expected = output.last_hidden_state[0, -1] if kind == "last" else torch.stack(layers).mean(0)
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_an_images_embedding_is_the_mean_of_its_tokens(base: LoadedBase, pictures: Path) -> None:
    """Oracle: what the model itself puts into a prompt's embeddings in place of the image tokens."""
    own = copy_base(base)
    model = attach_adapter(own.model, method_class("lora")(tiny_config("lora", Path("x"))).adapter(own)).eval()
    questions = [Question(text, f"{n}.png", text, "", {}) for n, text in enumerate(QUESTIONS[: len(SIZES)])]
    found = FeatureStore(own, "last", 2, None, view="image_text").features(model, questions, pictures)
    for row, prompt in enumerate(items(base, pictures)[: len(questions)]):
        with torch.no_grad():
            states = base.model.base_model(**batched(base, [prompt]), output_hidden_states=True).hidden_states[0][0]
        expected = states[prompt.input_ids == base.model.config.image_token_id].mean(0)
        torch.testing.assert_close(found[row, : len(expected)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize(("base", "scope"), GRAPHS, indirect=["base"])
def test_an_adapted_ffn_compiles_to_one_graph(scope: str, base: LoadedBase) -> None:
    torch._dynamo.reset()
    own = copy_base(base)
    method = method_class("moelora")(tiny_config("moelora", Path("x"), f"adapter.router_scope={scope}"))
    layer = next(iter(expert_layers(attach_adapter(own.model, method.adapter(own))).values())).double()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    width = own.model.config.get_text_config().hidden_size
    x = torch.randn(2, 5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    with routing(NEWEST_ROUTER):
        plain, fast = (torch.autograd.grad(form(x).square().sum(), [x, *parameters]) for form in (layer, compiled))
    for one, other in zip(plain, fast, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="session")
def runs_on(tmp_path_factory: pytest.TempPathFactory, mini_yaml: Path) -> Callable[[LoadedBase], Runs]:
    """The runs on a base; tests of the same base share what they train."""

    @cache
    def runs(folder: str) -> Runs:
        return Runs(tmp_path_factory.mktemp("runs"), Path(folder), mini_yaml)

    return lambda base: runs(base.model.name_or_path)


SHORT = ("training.steps=3", "training.save_steps=2")
PAIR = ("count", "side")


def pairs(tried: Iterable[str], always: tuple[str, ...]) -> list[tuple[str, str]]:
    """(family, name) pairs: ``always`` on every family and the others divided among them, or all on every family."""
    count = len(NAMES)
    shared = {name: place % count for place, name in enumerate(name for name in tried if name not in always)}
    return [(f, name) for n, f in enumerate(NAMES) for name in tried if EVERY or shared.get(name, n) == n]


@pytest.mark.slow
@pytest.mark.parametrize(("base", "method"), pairs(methods(), ("clmoe",)), indirect=["base"])
def test_two_tasks_are_trained_one_after_the_other_and_answered(
    method: str, base: LoadedBase, mini_yaml: Path, tmp_path: Path
) -> None:
    settings = [*SHORT, *ROWS[method].overrides, *(LLAVA_CMOE[-4:] if method == "llava_cmoe" else ())]
    where = {"order": ",".join(PAIR), "base": base.model.name_or_path}
    done = clmoe.run(method, mini_yaml, output=tmp_path / "run", settings=settings, **where)
    assert len(done.checkpoints) == {"union": 1, "none": 0}.get(ROWS[method].chain, 2)
    assert None not in done.matrix.row(PAIR[1])
    files = [file.read_text().splitlines() for file in (done.run / "predictions").rglob("*.jsonl")]
    assert {len(lines) for lines in files} == {12}
    assert len({json.loads(line)["text"] for lines in files for line in lines}) > 1


@pytest.mark.slow
@pytest.mark.parametrize(("base", "locator"), pairs(LOCATORS, ("nearest_mean",)), indirect=["base"])
def test_a_locator_finds_the_tasks(locator: str, base: LoadedBase, runs_on: Callable[[LoadedBase], Runs]) -> None:
    """A locator that is fitted must beat chance; a few steps teach a model neither letters nor prototypes."""
    runs, asks = runs_on(base), LOCATORS[locator].asks
    method = "mrlora" if asks else "modalprompt" if LOCATORS[locator].learned else "separate"
    checkpoint = runs.chain(method, *SHORT, *ROWS[method].overrides, tasks=PAIR)[1]
    output = runs.evaluate(checkpoint, checkpoint.parent / locator, *FAST.get(locator, ()), locator=locator)
    own = ("oracle", "learned_prototype", "generated_letter")  # the methods' own; their files name no locator
    suffix = "" if locator in own else f".{locator}"
    files = {task: output / "predictions" / PAIR[1] / f"{task}{suffix}.jsonl" for task in PAIR}
    found = {task: Counter(json.loads(line)["task"] for line in file.open()) for task, file in files.items()}
    assert all(counts.total() == 12 and counts.keys() <= set(PAIR) for counts in found.values())
    if make_locator(LocatorConfig(locator), 0).fits or locator == "oracle":
        assert sum(found[task][task] for task in PAIR) > 12, found


@pytest.mark.slow
@pytest.mark.parametrize("base", NAMES if EVERY else ["llava", "qwen3_vl"], indirect=True)
def test_a_killed_training_ends_in_the_same_bytes(
    base: LoadedBase, runs_on: Callable[[LoadedBase], Runs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, settings = runs_on(base), (*SHORT, "locator=nearest_mean")
    (whole,) = runs.chain("clmoe", *settings, tasks=("count",))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        on_step(patch, 2)
        runs.train(tmp_path / "count", "clmoe", "count", *settings)
    seen = on_step(monkeypatch, 99)
    runs.train(tmp_path / "count", "clmoe", "count", *settings)
    assert seen == [2], "it went on from its saved state"
    assert contents(tmp_path / "count") == contents(whole)


def test_a_tuned_projectors_gradients_come_in_one_order_with_and_without_images(
    base: LoadedBase, pictures: Path
) -> None:
    """ZeRO-2 adds up what the processes send first, second, ...; one may have an image where another has none."""
    own = copy_base(base)
    method = method_class("lora")(tiny_config("lora", Path("x"), "adapter.train_projector=true"))
    model = attach_adapter(own.model, method.adapter(own))
    trained, arrived = TrainedModel(model, method, 1, blank_image(own)).train(), list[str]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    orders = []
    for image in ("0.png", None):
        item = own.train_item(TrainRecord("r", image, TURNS), image and own.read_image(pictures / image), 4096)
        batch = collate_train([item], own.tokenizer.pad_token_id)
        trained(**batch, num_items_in_batch=torch.tensor(3))["loss"].backward()
        orders.append(arrived.copy())
        arrived.clear()
    assert orders[0] == orders[1] and any(PROJECTOR in name for name in orders[0])
    projector = {name: p for name, p in model.named_parameters() if PROJECTOR in name and p.requires_grad}
    model.zero_grad()
    trained(**batch, num_items_in_batch=torch.tensor(3))["loss"].backward()
    assert not any(p.grad.any() for p in projector.values())  # type: ignore[union-attr]


def test_recomputed_activations_give_the_same_gradients(base: LoadedBase, pictures: Path) -> None:
    """The gradients are equal bit for bit with and without recomputation, for records with and without an image."""
    names = ("0.png", "1.png", None)
    found = [
        base.train_item(TrainRecord("r", name, TURNS), name and base.read_image(pictures / name), 4096)
        for name in names
    ]
    method = method_class("clmoe")(tiny_config("clmoe", Path("x"), "adapter.train_projector=true"))
    gradients = []
    for recompute in (False, True):
        own = copy_base(base)
        model = attach_adapter(own.model, method.adapter(own)).train()
        if recompute:
            enable_checkpointing(model)
        batch = collate_train(found, base.tokenizer.pad_token_id)
        answers = (batch["labels"] != IGNORE).sum()
        TrainedModel(model, method, len(names))(**batch, num_items_in_batch=answers)["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, recomputed = gradients
    assert all(same_bits(plain[name], recomputed[name]) for name in plain)
    assert any(plain[name].abs().sum() > 0 for name in plain if "modules_to_save" in name)


def test_a_tuned_projector_is_float32_on_a_base_of_16_bits(base: LoadedBase, pictures: Path, tmp_path: Path) -> None:
    own = copy_base(base)
    own.model.bfloat16()
    method = method_class("lora")(tiny_config("lora", Path("x"), "adapter.train_projector=true"))
    model = attach_adapter(own.model, method.adapter(own)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(2**-12)  # less than one bit of most 16-bit weights
    batch = to_device(batched(base, items(base, pictures)), own)
    with torch.no_grad():
        expected = own.model(**batch).logits
    assert expected.dtype == torch.bfloat16
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    detach_adapter(model)
    again = load_adapter(own.model, tmp_path, trainable=True).eval()  # this compares every bit with the file
    with torch.no_grad():
        assert torch.equal(again.base_model.model(**batch).logits, expected)
    saved = tensors(tmp_path)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    names = [name for name in saved if "lora" not in name]
    assert any((saved[name] != saved[name].bfloat16().float()).any() for name in names)
