"""Once converted, CoIN's and CL-MoE's adapters compute the published formula, and checkpoints of 0.1 score the same."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clmoe.bases.llava import LoadedBase
from clmoe.cli import main
from clmoe.experts.model import load_adapter
from clmoe.train.checkpoint import read_checkpoint, seal
from clmoe.train.task import save_adapter
from clmoe.utils.files import read_json, write_json
from tests.convert.test_weights import Canary
from tests.runs import DAMAGES, Runs, contents
from tests.support import SIZES, copy_base, prompt_batch

EXPERTS, RANK, ALPHA = 4, 8, 24
ATTENTION, FFN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
QUESTIONS = ["Which colour is it?", "How many things are there on the left?"]
START = "base_model.model.model."


def shapes(name: str) -> tuple[int, int]:
    """``(din, dout)`` of a linear of the tiny model."""
    width, ffn = SIZES.text_hidden, SIZES.text_ffn
    return {"gate_proj": (width, ffn), "up_proj": (width, ffn), "down_proj": (ffn, width)}.get(name, (width, width))


def places() -> list[str]:
    blocks = range(SIZES.text_layers)
    return [f"layers.{b}.{'self_attn' if n in ATTENTION else 'mlp'}.{n}" for b in blocks for n in (*ATTENTION, *FFN)]


def random(*shape: int, scale: float = 0.12) -> Tensor:
    return (torch.randn(*shape) * scale).bfloat16()


def adapter_file(spelling: str) -> dict[str, Tensor]:
    """``adapter_model.bin`` in 16 bits, as training in bf16 leaves it: of MoELoRA, or of LoRA with ``plain``."""
    torch.manual_seed(4)
    found = {}
    for place in places():
        din, dout = shapes(place.rpartition(".")[2])
        start = f"{START}{place}"
        if spelling == "plain":
            found |= {f"{start}.lora_A.weight": random(RANK, din), f"{start}.lora_B.weight": random(dout, RANK)}
            continue
        found[f"{start}.lora_router.weight"] = random(EXPERTS, din, scale=1.0)
        for i in range(EXPERTS):
            for factor, matrix in (("A", random(RANK // EXPERTS, din)), ("B", random(dout, RANK // EXPERTS))):
                for inner in {"short": [""], "long": [".mlp"], "both": ["", ".mlp"]}[spelling]:
                    found[f"{start}.lora_{factor}.lora{factor}.{i}{inner}.weight"] = matrix
    return found


def projector_file() -> dict[str, Tensor]:
    torch.manual_seed(6)
    sizes = {"0": (SIZES.text_hidden, SIZES.vision_hidden), "2": (SIZES.text_hidden, SIZES.text_hidden)}
    weights = {f"{START}mm_projector.{n}.weight": random(*size) for n, size in sizes.items()}
    return weights | {f"{START}mm_projector.{n}.bias": random(SIZES.text_hidden) for n in sizes}


def write(folder: Path, kind: str, adapter: Any, projector: Any = None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    values = {
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "bias": "none", "expert_num": EXPERTS,
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layers_pattern": None,
        "layers_to_transform": None, "lora_alpha": ALPHA, "lora_dropout": 0.05, "modules_to_save": None,
        "peft_type": kind, "r": RANK, "task_embedding_dim": 64, "task_type": "CAUSAL_LM_CoIN",
        "target_modules": ["down_proj", "q_proj", "o_proj", "gate_proj", "v_proj", "k_proj", "up_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(values | changes))
    torch.save(adapter, folder / "adapter_model.bin")
    if projector is not None:
        torch.save(projector, folder / "non_lora_trainables.bin")
    return folder


def add_by_loops(base: LoadedBase, adapter: dict[str, Tensor], projector: dict[str, Tensor] | None) -> None:
    """Put CoIN's ``forward`` on every linear, expert by expert, and replace the base's projector with the tuned one."""

    def hook(start: str) -> Callable[..., Tensor]:
        def forward(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            x = inputs[0]
            if f"{start}.lora_A.weight" in adapter:
                A, B = adapter[f"{start}.lora_A.weight"].float(), adapter[f"{start}.lora_B.weight"].float()
                return output + ALPHA / RANK * (x @ A.t() @ B.t())
            gate = torch.softmax(x @ adapter[f"{start}.lora_router.weight"].float().t(), dim=-1)
            for i in range(EXPERTS):
                A = adapter[f"{start}.lora_A.loraA.{i}.weight"].float()
                B = adapter[f"{start}.lora_B.loraB.{i}.weight"].float()
                output = output + ALPHA / RANK * gate[..., i : i + 1] * (x @ A.t() @ B.t())
            return output

        return forward

    for place in places():
        base.model.model.language_model.get_submodule(place).register_forward_hook(hook(START + place))
    if projector is not None:
        ours = base.model.model.multi_modal_projector
        with torch.no_grad():
            for number, linear in (("0", ours.linear_1), ("2", ours.linear_2)):
                linear.weight.copy_(projector[f"{START}mm_projector.{number}.weight"])
                linear.bias.copy_(projector[f"{START}mm_projector.{number}.bias"])


@pytest.fixture
def convert(tiny_folder: Path, mini_yaml: Path, tmp_path: Path) -> Callable[[Path], Path]:
    def run(source: Path) -> Path:
        given = ["--model", tiny_folder, "--benchmark", mini_yaml, "--tasks", "colour,count"]
        main([str(part) for part in ["convert", source, tmp_path / "out", *given]])
        return tmp_path / "out"

    return run


@torch.no_grad()
def logits(model: Any, base: LoadedBase) -> Tensor:
    inputs = prompt_batch(base, QUESTIONS)
    return model(**inputs).logits * inputs["attention_mask"][..., None]


@pytest.mark.parametrize(
    ("kind", "spelling", "tuned"),
    [("MOE_LORA_CoIN", "short", True), ("MOE_LORA_CLMoE", "both", True), ("MOE_LORA_CoIN", "long", False),
     ("LORA", "plain", True)],
)  # fmt: skip
def test_a_converted_adapter_computes_the_published_formula(
    kind: str, spelling: str, tuned: bool, pristine_base: LoadedBase, convert: Callable[[Path], Path], tmp_path: Path
) -> None:
    projector = projector_file() if tuned else None
    out = convert(write(tmp_path / "legacy", kind, adapter_file(spelling), projector))
    by_loops = copy_base(pristine_base)
    add_by_loops(by_loops, adapter_file("plain" if spelling == "plain" else "short"), projector)
    converted = load_adapter(copy_base(pristine_base).model, out, trainable=False)
    ours, theirs = logits(converted, pristine_base), logits(by_loops.model, pristine_base)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - logits(pristine_base.model, pristine_base)).abs().max() > 0.1, "the adapter does something"
    save_adapter(converted, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), "as peft would have written it"


def test_the_checkpoint_is_one_of_ours(
    runs: Runs, pristine_base: LoadedBase, convert: Callable[[Path], Path], tmp_path: Path
) -> None:
    """The converted checkpoint passes its verification, can be evaluated, and is continued by the next task."""
    adapter, projector = adapter_file("short"), projector_file()
    out = convert(write(tmp_path / "legacy", "MOE_LORA_CoIN", adapter, projector))
    done = read_checkpoint(out)
    assert (done.lineage.method, done.lineage.tasks, done.lineage.steps) == ("moelora", ["colour", "count"], 0)
    assert done.lineage.base == pristine_base.fingerprint
    assert done.lineage.trainable_parameters == sum(t.numel() for t in (adapter | projector).values())
    assert done.lineage.effective_scale == pytest.approx(ALPHA / RANK / EXPERTS)
    runs.evaluate(out, tmp_path / "run")
    same = ["adapter.rank=8", "adapter.experts=4", "adapter.alpha=24", "adapter.scale=null", "adapter.dropout=0.05"]
    targets = f"adapter.targets=[{','.join((*ATTENTION, *FFN))}]"
    after = runs.train(tmp_path / "next" / "03-side", "moelora", "side", *same, targets, previous=out)
    assert read_checkpoint(after).lineage.tasks == ["colour", "count", "side"]


def damaged(drop: str | None = None, **add: Tensor) -> dict[str, Tensor]:
    return {name: t for name, t in adapter_file("short").items() if name != drop} | add


EXPERT = f"{START}layers.1.mlp.up_proj.lora_B.loraB.3.weight"


@pytest.mark.parametrize(
    ("adapter", "projector", "changes", "named"),
    [
        (damaged(EXPERT), None, {}, f"adapter_model.bin: lacks {EXPERT}"),
        (damaged(extra=torch.ones(2)), None, {}, "adapter_model.bin: should not hold extra"),
        (damaged(**{EXPERT: random(7, 2)}), None, {}, f"{EXPERT} has shape [7, 2]"),
        (damaged(**{EXPERT.replace(".weight", ".mlp.weight"): random(64, 2)}), None, {}, EXPERT),
        (damaged(), projector_file() | {"lm_head.weight": random(2)}, {}, "trainables.bin: should not hold lm_head"),
        (damaged(), {}, {}, "non_lora_trainables.bin: lacks"),
        (damaged(**{EXPERT: torch.full((64, 2), torch.nan)}), None, {}, f"adapter_model.bin: {EXPERT} holds NaN"),
        (damaged(), projector_file() | {"lm_head.weight": random(2) / 0}, {}, "trainables.bin: lm_head.weight holds"),
        (damaged(), None, {"expert_num": 3}, "adapter.experts 3"),
        (damaged(), None, {"peft_type": "MOE_LORA_HiDe"}, "peft_type is 'MOE_LORA_HiDe'"),
        (damaged(), None, {"use_rslora": True}, "use_rslora is True"),
        (damaged(), None, {"alpha_pattern": {"q_proj": 4}}, "alpha_pattern is {'q_proj': 4}"),
        (damaged(), None, {"target_modules": ["fc1"]}, "target_modules is"),
        (damaged(), None, {"r": None}, "r is None"),
        ({"x": Canary(Path("sang"))}, None, {}, "adapter_model.bin: refused"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    adapter: Any, projector: Any, changes: dict[str, Any], named: str, convert: Callable[[Path], Path],
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)  # where a canary would sing
    source = write(tmp_path / "legacy", changes.pop("peft_type", "MOE_LORA_CoIN"), adapter, projector, **changes)
    with pytest.raises(SystemExit) as stop:
        convert(source)
    assert stop.value.code == 2 and named in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["legacy"], "nothing is left behind, and nothing was run"


def test_a_task_that_is_listed_twice_is_refused(
    tiny_folder: Path, mini_yaml: Path, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "legacy", "MOE_LORA_CoIN", damaged(), None)
    twice = ["--benchmark", str(mini_yaml), "--tasks", "colour,colour"]
    checkpoint = str(runs.chain("lora", tasks=("colour",))[0])
    for line in (
        ["convert", str(source), str(tmp_path / "out"), "--model", str(tiny_folder), *twice],
        ["eval", "--checkpoint", checkpoint, "--output", str(tmp_path / "out"), *twice],
    ):
        with pytest.raises(SystemExit):
            main(line)
        assert "--tasks: task 'colour'" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- Checkpoints of clmoe 0.1

GROWING = ("adapter.train_projector=false", "options.extend=every", "locator.samples=20")
VAE = ("steps=60", "hidden=16", "latent=4", "held_out=0.5")
METHODS = {
    "clmoe": ("clmoe", ["options.samples=20", "locator.samples=20", "locator.options.distance=cosine"]),
    "vae": ("llava_cmoe", [*GROWING, *(f"locator.options.{option}" for option in VAE)]),
    "prototype": ("llava_cmoe", [*GROWING, "locator=prototype", "locator.feature=pooled"]),
    "separate": ("lora", []),
}
"""Case -> today's method and its settings."""


def seal_as_0_1(checkpoint: Path, case: str, old: Path) -> None:
    """Write ``checkpoint`` in format 1: the locator's settings are among the method's options and not in its file."""
    shutil.copytree(checkpoint, old)
    values = yaml.safe_load((old / "config.yaml").read_text())
    locator, bank = values.pop("locator"), old / "locator.safetensors"
    values["adapter"]["budget"] = None
    if case == "clmoe":
        values["options"] |= locator["options"]
    elif case == "separate":
        values["method"] = case
    else:
        values["options"] |= {"decider": case, "feature": locator["feature"], "samples": locator["samples"]}
        values["options"]["locator"] = locator["options"]
    (old / "config.yaml").write_text(yaml.safe_dump(values))
    write_json(old / "continual.json", read_json(old / "continual.json") | {"method": values["method"]})
    if bank.is_file():
        save_file(load_file(bank), bank)
    if case == "prototype":  # 0.1 kept it beside the other locator's bank
        bank.rename(old / "prototypes.safetensors")
        bank.touch()
    seal(old)
    write_json(old / "manifest.json", read_json(old / "manifest.json") | {"format_version": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("case", METHODS)
def test_a_converted_checkpoint_evaluates_to_the_same_matrix(
    case: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, settings = METHODS[case]
    checkpoint, old, converted = runs.chain(method, *settings)[1], tmp_path / "old", tmp_path / "converted"
    seal_as_0_1(checkpoint, case, old)
    with pytest.raises(SystemExit):
        runs.evaluate(old, tmp_path / "refused")
    assert f"clmoe convert {old}" in capsys.readouterr().err
    main(["convert", str(old), str(converted)])
    config = read_checkpoint(checkpoint).config
    assert read_checkpoint(converted).config == (replace(config, label=case) if case == "separate" else config)
    folders = (converted, checkpoint)
    found, wanted = (contents(runs.evaluate(folder, tmp_path / f"{folder.name}-run")) for folder in folders)
    tables = {name for name in wanted if name.endswith((".csv", ".jsonl"))} - {"events.jsonl"}
    assert "matrix.csv" in tables and ("locator.csv" in tables) == (case != "separate")
    assert {name: found[name] for name in tables} == {name: wanted[name] for name in tables}
    DAMAGES["flipped"](old / "adapter_model.safetensors")
    with pytest.raises(SystemExit):
        main(["convert", str(old), str(tmp_path / "new")])
    assert f"{old}/adapter_model.safetensors" in capsys.readouterr().err and not (tmp_path / "new").exists()
