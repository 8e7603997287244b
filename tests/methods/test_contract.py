"""What every method promises its users. Each method has a row in ``ROWS``; one without a row fails here."""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlavaForConditionalGeneration

import clmoe
from clmoe import contract
from clmoe.bases.llava import LoadedBase
from clmoe.benchmarks.base import Benchmark
from clmoe.config import load_config
from clmoe.experts.layer import expert_layers
from clmoe.experts.model import attach_adapter, load_adapter
from clmoe.methods import method_class, methods
from clmoe.train import task as task_module
from clmoe.train.checkpoint import read_checkpoint
from clmoe.train.task import prepare_request, train_task
from tests.methods.helpers import same_adapter
from tests.runs import Runs, tensors
from tests.support import TASKS, prompt_batch, tiny_config

LORA = r"language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.lora_[AB]\."
ALL_LORA = r"language_model\.layers\.\d+\.(mlp|self_attn)\.\w+_proj\.lora_[AB]\."
EXPERTS = r"language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.clmoe_(experts\..*\.[AB]$|routers\..*\.weight$)"
BLOCKS = r"language_model\.layers\.\d+\.mlp\.clmoe_(experts\..*\.[AB]$|routers\..*\.weight$)"
GATES = r"language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.clmoe_routers\..*(instruction\.weight|fusion)$"
GUIDE = r"language_model\.layers\.0\.mlp\.gate_proj\.clmoe_routers\..*guide\.(key|norm\.weight|norm\.bias)$"
PROMPTS = r"language_model\.embed_tokens\.clmoe_prompts\.\w+\.(prompt|transform\.\d\.(weight|bias))$"
PROJECTOR = r"multi_modal_projector\.modules_to_save\."


ROUTER = ("options.stored=4", "options.router_rank=16", "options.router_epochs=1", "options.router_batch=8")


@dataclass(frozen=True)
class Row:
    """What a method may train (patterns, each of which must match), the files of its own state, and the settings that
    it needs on the miniature benchmark."""

    trains: tuple[str, ...]
    state: tuple[str, ...] = ()
    chain: str = "sequence"
    overrides: tuple[str, ...] = ()


ROWS = {
    "lora": Row((LORA, PROJECTOR)),
    "multitask": Row((LORA, PROJECTOR), chain="union"),
    "separate": Row((LORA,), chain="fresh", overrides=("adapter.train_projector=false",)),
    "disco": Row((ALL_LORA,), ("locator.safetensors",), "fresh", ("adapter.train_projector=false",)),
    "hide": Row((ALL_LORA,), ("locator.safetensors",), "fresh", ("adapter.train_projector=false",)),
    "mrlora": Row((ALL_LORA,), ("memory.json",), "fresh", ("adapter.train_projector=false", *ROUTER)),
    "moelora": Row((EXPERTS, PROJECTOR)),
    "clmoe": Row((EXPERTS, PROJECTOR), ("statistics.safetensors", "locator.safetensors")),
    "llava_cmoe": Row(
        (BLOCKS,),
        ("expansion.json", "locator.safetensors"),
        overrides=("adapter.train_projector=false", "options.probe_min_steps=2", "locator.options.steps=20"),
    ),
    "ewc": Row((LORA, PROJECTOR), ("importance.safetensors",)),
    "mas": Row((LORA, PROJECTOR), ("importance.safetensors",)),
    "lwf": Row((LORA, PROJECTOR)),
    "replay": Row((LORA, PROJECTOR), ("memory.json",)),
    "der": Row((LORA, PROJECTOR), ("memory.json", "memory_logits.safetensors")),
    "agem": Row((LORA, PROJECTOR), ("memory.json",)),
    "dgg": Row((LORA, PROJECTOR), ("memory.json",)),
    "keeplora": Row((EXPERTS, PROJECTOR), ("kept_directions.safetensors",)),
    "llaca": Row((LORA, PROJECTOR)),
    "olora": Row((EXPERTS, PROJECTOR)),
    "reglora": Row((EXPERTS, PROJECTOR), ("key_elements.safetensors",)),
    "modalprompt": Row((PROMPTS,), overrides=("adapter.train_projector=false", "options.length=3")),
    "smolora": Row((EXPERTS, GATES, PROJECTOR), ("locator.safetensors",)),
    "proglora": Row((EXPERTS, GUIDE, PROJECTOR)),
    "same": Row((EXPERTS, PROJECTOR), ("input_spectra.safetensors",)),
    "zero_shot": Row((), chain="none"),
}
TRAINED = [name for name, row in ROWS.items() if row.chain != "none"]
CONTINUED = [name for name, row in ROWS.items() if row.chain == "sequence"]
CHAINED = [name for name, row in ROWS.items() if row.chain in ("sequence", "fresh")]
BEFORE = {"llava_cmoe": 2, "mrlora": 1}  # steps of the second task before its last training phase
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
COMMON_FILES = ADAPTER_FILES | {"config.yaml", "continual.json", "manifest.json"}


def test_every_method_has_a_row_and_a_config() -> None:
    assert methods().keys() == ROWS.keys()
    for name, row in ROWS.items():
        assert load_config(name, {}, []).method == name
        assert method_class(name).chain == row.chain
        assert method_class(name).__doc__


def first(runs: Runs, method: str) -> Path:
    """A checkpoint that continues no other one: after the first task, or after the union."""
    if ROWS[method].chain == "union":
        key = (method, "union")
        if key not in runs.made:
            runs.made[key] = [runs.train(runs.root / "union" / "all", method, "all")]
        return runs.made[key][0]
    return runs.chain(method, *ROWS[method].overrides, tasks=TASKS[:1])[0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("adapter.rank_is=total",), 16 / 8 / 4),
        (("adapter.rank_is=per_expert",), 16 / 8 / 4),
        (("adapter.rank_is=per_expert", "adapter.router_top_k=2"), 16 / 8 / 2),
        (("adapter.router_top_k=2", "adapter.scale=0.7"), 0.7),
    ],
)
def test_the_effective_scale_is_the_layers_factor_times_its_gate(
    settings: tuple[str, ...], expected: float, tiny_base: LoadedBase
) -> None:
    """The scale is alpha / rank over the number of experts that share a token: all four, or the router's top two."""
    config = tiny_config("moelora", Path("nowhere"), "adapter.alpha=16", *settings)
    method = method_class("moelora")(config)
    for layer in expert_layers(attach_adapter(tiny_base.model, method.adapter(tiny_base))).values():
        with torch.no_grad():
            gate = layer.routers(torch.randn(2, 3, layer.routers.instance[0].weight.shape[1]))
        for experts in layer.experts.values():
            assert experts.scaling * float(gate[gate > 0].mean()) == pytest.approx(expected)
    assert method.effective_scale() == pytest.approx(expected)


@pytest.mark.parametrize("name", TRAINED)
def test_a_fresh_adapter_changes_nothing_and_trains_only_what_it_may(name: str, tiny_base: LoadedBase) -> None:
    config = tiny_config(name, Path("nowhere"), "adapter.train_projector=true", *ROWS[name].overrides)
    batch = prompt_batch(tiny_base, ["What is it?", "Which colour is it?"])
    trainable = contract.fresh_adapter_changes_nothing(method_class(name)(config), tiny_base, batch)
    for pattern in ROWS[name].trains:
        assert any(re.search(pattern, parameter) for parameter in trainable), f"{pattern} does not train"
    wrong = [parameter for parameter in trainable if not any(re.search(p, parameter) for p in ROWS[name].trains)]
    assert not wrong


@pytest.mark.parametrize("name", TRAINED)
def test_training_leaves_the_base_bit_identical(
    name: str, mini: Benchmark, tiny_folder: Path, new_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation in the same process gets the base back without the adapter and with its own projector."""
    base = new_base()
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    config = load_config(name, mini.recipe, list(ROWS[name].overrides), str(tiny_folder))
    task = "all" if ROWS[name].chain == "union" else TASKS[0]
    monkeypatch.setattr(task_module, "load_base", lambda *arguments: base)
    assert train_task(prepare_request(config, mini, task, list(TASKS), None, tmp_path / task)) is base
    contract.base_is_as_before(base, before)


@pytest.mark.parametrize("name", TRAINED)
def test_a_checkpoint_holds_its_files_and_loads_bit_for_bit(name: str, runs: Runs, tiny_base: LoadedBase) -> None:
    checkpoint = first(runs, name)
    assert {path.name for path in checkpoint.iterdir()} == COMMON_FILES | set(ROWS[name].state)
    for path in checkpoint.iterdir():
        assert f"{datetime.now(UTC):%Y-%m-}".encode() not in path.read_bytes(), "no file holds a time"
    contract.checkpoint_loads_bit_for_bit(checkpoint, tiny_base, runs.root)
    lineage, method = read_checkpoint(checkpoint).lineage, method_class(name)(read_checkpoint(checkpoint).config)
    assert lineage.method == name
    trained = {k: v for k, v in tensors(checkpoint).items() if "task.gates" not in k and method.rate_factor(k)}
    assert lineage.trainable_parameters == sum(value.numel() for value in trained.values())
    union = ROWS[name].chain == "union"
    assert (lineage.tasks, lineage.steps) == ((list(TASKS), 12) if union else ([TASKS[0]], 4))


@pytest.mark.parametrize("name", CONTINUED)
def test_the_second_task_starts_from_the_parents_file_bit_for_bit(name: str, runs: Runs, tmp_path: Path) -> None:
    parent, settings = first(runs, name), ("training.steps=1", *ROWS[name].overrides)
    train = partial(runs.train, tmp_path / TASKS[1], name, TASKS[1], *settings, previous=parent)
    contract.starts_from_its_parent(method_class(name), parent, train)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINED)
def test_killed_in_mid_training_and_at_its_end_it_ends_in_the_same_bytes(name: str, runs: Runs, tmp_path: Path) -> None:
    """The second task, with dropout, is killed in its last training's third step and again when that one is sealed."""
    settings = ("training.save_steps=2", "adapter.dropout=0.2", *ROWS[name].overrides)
    previous, straight = runs.chain(name, *settings)
    train = partial(runs.train, tmp_path / TASKS[1], name, TASKS[1], *settings, previous=previous)
    contract.killed_it_ends_in_the_same_bytes(method_class(name), train, straight, BEFORE.get(name, 0) + 2)


@pytest.mark.parametrize("name", [name for name in TRAINED if method_class(name).answer_options])
def test_options_of_answers_do_not_act_in_training(name: str, runs: Runs) -> None:
    tried = load_config(name, {}, []).tune
    values = [f"options.{option}={tried[f'options.{option}'][0]}" for option in method_class(name).answer_options]
    pairs = zip(runs.chain(name, *ROWS[name].overrides), runs.chain(name, *ROWS[name].overrides, *values), strict=True)
    for usual, other in pairs:
        changed = {path.name for path in usual.iterdir() if path.read_bytes() != (other / path.name).read_bytes()}
        assert changed - {"continual.json"} == {"config.yaml", "manifest.json"}, "the parent's hash may change"


@pytest.mark.parametrize("name", TRAINED)
def test_answers_through_the_public_face(name: str, runs: Runs, mini_yaml: Path) -> None:
    loaded = clmoe.load(first(runs, name))
    image = mini_yaml.parent / TASKS[0] / "images" / "0.png"
    told = {"task": TASKS[0]} if name == "separate" else {}  # its locator is the oracle, which needs the task
    answer = loaded.explain(image, "Which colour is it?", max_new_tokens=6, **told)
    assert answer.task == (TASKS[0] if method_class(name).keeps_parts else None)
    assert answer.text == loaded.answer(image, "Which colour is it?", max_new_tokens=6, **told)
    others = ("How many things are there?", "On which side is it, left or right?")
    texts = {answer.text, *(loaded.answer(None, question, max_new_tokens=6, **told) for question in others)}
    assert len(texts) > 1 and "" not in texts


PLAINER = {
    "lwf": (("options.weight=0",), "lora", ()),
    "ewc": (("options.weight=0",), "lora", ()),
    "mas": (("options.weight=0",), "lora", ()),
    "replay": (("options.ratio=0",), "lora", ()),
    "der": (("options.per_task=5", "options.weight=0"), "replay", ("options.per_task=5",)),
}


@pytest.mark.parametrize("name", PLAINER)
def test_a_method_without_its_own_term_is_the_plainer_one(name: str, runs: Runs) -> None:
    settings, plainer, others = PLAINER[name]
    for mine, other in zip(runs.chain(name, *settings), runs.chain(plainer, *others), strict=True):
        assert same_adapter(mine, other)
    assert not same_adapter(runs.chain(name)[1], runs.chain(plainer)[1]), "its term has an effect"


def test_a_plain_lora_checkpoint_loads_in_stock_peft(runs: Runs, tiny_base: LoadedBase) -> None:
    """The loaders of transformers and peft give the same logits as ours, from both the LoRA and the tuned projector."""
    checkpoint = first(runs, "lora")
    assert json.loads((checkpoint / "adapter_config.json").read_text())["peft_type"] == "LORA"
    batch = prompt_batch(tiny_base, ["What is it?", "Which colour is it?"])
    loaded = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(runs.model), checkpoint).eval()
    with torch.no_grad():
        plain, stock = tiny_base.model(**batch).logits, loaded(**batch).logits
        ours = load_adapter(tiny_base.model, checkpoint, trainable=False).eval()(**batch).logits
    torch.testing.assert_close(stock, ours, atol=1e-5, rtol=1e-5)
    assert (stock - plain).abs().max() > 1e-2, "the adapter has an effect"
