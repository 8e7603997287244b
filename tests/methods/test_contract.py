"""What every method owes its users: one row each; a method without a row fails here."""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import clmoe
from clmoe.bases.llava import LoadedBase
from clmoe.benchmarks.base import Benchmark
from clmoe.config import load_config
from clmoe.experts.layer import expert_layers
from clmoe.experts.model import adapter_tensors, attach_adapter, load_adapter
from clmoe.methods import method_class, methods
from clmoe.methods.base import Method, Phase, TaskContext
from clmoe.train import task as task_module
from clmoe.train.checkpoint import read_checkpoint
from clmoe.train.task import prepare_request, train_task
from tests.methods.helpers import same_adapter
from tests.runs import Killed, Runs, contents, kill, on_step, same_bits, tensors
from tests.support import TASKS, prompt_batch, tiny_config

LORA = r"language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.lora_[AB]\."
EXPERTS = r"language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.clmoe_(experts\..*\.[AB]$|routers\..*\.weight$)"
BLOCKS = r"language_model\.layers\.\d+\.mlp\.clmoe_(experts\..*\.[AB]$|routers\..*\.weight$)"
PROJECTOR = r"multi_modal_projector\.modules_to_save\."


@dataclass(frozen=True)
class Row:
    """What a method may train (as patterns, each of which must occur), the files of its own state, and settings that
    it needs on the miniature benchmark."""

    trains: tuple[str, ...]
    state: tuple[str, ...] = ()
    chain: str = "sequence"
    overrides: tuple[str, ...] = ()


ROWS = {
    "lora": Row((LORA, PROJECTOR)),
    "multitask": Row((LORA, PROJECTOR), chain="union"),
    "separate": Row((LORA,), chain="fresh", overrides=("adapter.train_projector=false",)),
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
    "olora": Row((EXPERTS, PROJECTOR)),
    "zero_shot": Row((), chain="none"),
}
TRAINED = [name for name, row in ROWS.items() if row.chain != "none"]
CONTINUED = [name for name, row in ROWS.items() if row.chain == "sequence"]
CHAINED = [*CONTINUED, "separate"]
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
COMMON_FILES = ADAPTER_FILES | {"config.yaml", "continual.json", "manifest.json"}


def test_every_method_has_a_row_and_a_config() -> None:
    assert methods().keys() == ROWS.keys()
    for name, row in ROWS.items():
        assert load_config(name, {}, []).method == name
        assert method_class(name).chain == row.chain
        assert method_class(name).__doc__


def first(runs: Runs, method: str) -> Path:
    """A checkpoint that continues no other: of the first task, or of the union."""
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
    """alpha / rank over the number of experts that share a token, four here or the router's two."""
    config = tiny_config("moelora", Path("nowhere"), "adapter.alpha=16", *settings)
    method = method_class("moelora")(config)
    for layer in expert_layers(attach_adapter(tiny_base.model, method.adapter(tiny_base))).values():
        with torch.no_grad():
            gate = layer.routers(torch.randn(2, 3, layer.routers.instance[0].weight.shape[1]))
        for experts in layer.experts.values():
            assert experts.scaling * float(gate[gate > 0].mean()) == pytest.approx(expected)
    assert method.effective_scale() == pytest.approx(expected)


@pytest.mark.parametrize("name", TRAINED)
def test_a_fresh_adapter_changes_nothing_and_trains_only_what_it_may(
    name: str, tiny_base: LoadedBase, pristine_base: LoadedBase
) -> None:
    config = tiny_config(name, Path("nowhere"), "adapter.train_projector=true", *ROWS[name].overrides)
    model = attach_adapter(tiny_base.model, method_class(name)(config).adapter(tiny_base))
    batch = prompt_batch(tiny_base, ["What is it?", "Which colour is it?"])
    with torch.no_grad():
        assert same_bits(model.eval()(**batch).logits, pristine_base.model(**batch).logits)
    trainable = [parameter for parameter, p in model.named_parameters() if p.requires_grad]
    for pattern in ROWS[name].trains:
        assert any(re.search(pattern, parameter) for parameter in trainable), f"{pattern} does not train"
    wrong = [parameter for parameter in trainable if not any(re.search(p, parameter) for p in ROWS[name].trains)]
    assert not wrong


@pytest.mark.parametrize("name", TRAINED)
def test_training_leaves_the_base_bit_identical(
    name: str, mini: Benchmark, tiny_folder: Path, new_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what evaluation of the same process gets back: the base without adapter, its own projector included."""
    base = new_base()
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    config = load_config(name, mini.recipe, list(ROWS[name].overrides), str(tiny_folder))
    task = "all" if ROWS[name].chain == "union" else TASKS[0]
    monkeypatch.setattr(task_module, "load_base", lambda *arguments: base)
    assert train_task(prepare_request(config, mini, task, list(TASKS), None, tmp_path / task)) is base
    after = base.model.state_dict()
    assert after.keys() == before.keys(), "the adapter was taken off again"
    for key, value in before.items():
        assert same_bits(after[key], value), key
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


@pytest.mark.parametrize("name", TRAINED)
def test_a_checkpoint_holds_its_files_and_loads_bit_for_bit(name: str, runs: Runs, tiny_base: LoadedBase) -> None:
    checkpoint = first(runs, name)
    assert {path.name for path in checkpoint.iterdir()} == COMMON_FILES | set(ROWS[name].state)
    for path in checkpoint.iterdir():
        assert str(runs.root).encode() not in path.read_bytes(), "no file holds a path"
        assert f"{datetime.now(UTC):%Y-%m-}".encode() not in path.read_bytes(), "nor a time"
    saved = tensors(checkpoint)
    live = adapter_tensors(load_adapter(tiny_base.model, checkpoint, trainable=False))
    assert saved.keys() == live.keys()
    for key, value in saved.items():
        assert same_bits(live[key].contiguous(), value), key
    lineage = read_checkpoint(checkpoint).lineage
    assert lineage.method == name
    assert lineage.trainable_parameters == sum(v.numel() for k, v in saved.items() if "task.gates" not in k)
    assert lineage.adapter_parameters == sum(value.numel() for value in saved.values())
    union = ROWS[name].chain == "union"
    assert (lineage.tasks, lineage.steps) == ((list(TASKS), 12) if union else ([TASKS[0]], 4))


@pytest.mark.parametrize("name", CONTINUED)
def test_the_second_task_starts_from_the_parents_file_bit_for_bit(
    name: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = first(runs, name)
    start: dict[str, Tensor] = {}
    kind = method_class(name)
    phases = kind.phases

    def spy(self: Method, context: TaskContext) -> list[Phase]:
        start.update({key: value.detach().clone() for key, value in adapter_tensors(context.model).items()})
        assert context.previous == parent
        return phases(self, context)

    monkeypatch.setattr(kind, "phases", spy)
    runs.train(tmp_path / TASKS[1], name, TASKS[1], "training.steps=1", *ROWS[name].overrides, previous=parent)
    saved = tensors(parent)
    assert start.keys() == saved.keys()
    for key, value in saved.items():
        assert same_bits(start[key].contiguous(), value), key


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINED)
def test_killed_in_mid_training_and_at_its_end_it_ends_in_the_same_bytes(
    name: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second task with dropout: killed in its last training's third step, then when that training is sealed."""
    settings = ("training.save_steps=2", "adapter.dropout=0.2", *ROWS[name].overrides)
    previous, straight = runs.chain(name, *settings)
    probes = 2 if name == "llava_cmoe" else 0
    for at_the_end in (False, True):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            if at_the_end:
                patch.setattr(method_class(name), "end_task", kill)
            else:
                on_step(patch, probes + 2)
            runs.train(tmp_path / TASKS[1], name, TASKS[1], *settings, previous=previous)
    runs.train(tmp_path / TASKS[1], name, TASKS[1], *settings, previous=previous)
    assert contents(tmp_path / TASKS[1]) == contents(straight)


@pytest.mark.parametrize("name", TRAINED)
def test_answers_through_the_public_face(name: str, runs: Runs, mini_yaml: Path) -> None:
    loaded = clmoe.load(first(runs, name))
    image = mini_yaml.parent / TASKS[0] / "images" / "0.png"
    told = {"task": TASKS[0]} if name == "separate" else {}  # its locator is the oracle
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
    """By transformers' and peft's own loaders, LoRA and tuned projector give the same logits."""
    checkpoint = first(runs, "lora")
    assert json.loads((checkpoint / "adapter_config.json").read_text())["peft_type"] == "LORA"
    batch = prompt_batch(tiny_base, ["What is it?", "Which colour is it?"])
    loaded = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(runs.model), checkpoint).eval()
    with torch.no_grad():
        plain, stock = tiny_base.model(**batch).logits, loaded(**batch).logits
        ours = load_adapter(tiny_base.model, checkpoint, trainable=False).eval()(**batch).logits
    torch.testing.assert_close(stock, ours, atol=1e-5, rtol=1e-5)
    assert (stock - plain).abs().max() > 1e-2, "the adapter has an effect"
