"""``--fit`` and a sequence's cost: the cheapest settings that fit, hours from FLOPs, and what must be fetched."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clmoe import cli
from clmoe.bases.inputs import SharedPrompts
from clmoe.bases.llava import decoder_layers, load_base, meta_base
from clmoe.benchmarks.base import load_benchmark
from clmoe.config import Config, load_config
from clmoe.errors import ClmoeError
from clmoe.experts.forward import prefill
from clmoe.experts.routing import NEWEST_ROUTER
from clmoe.methods import method_class
from clmoe.plan import FirstTask, activation_bytes, answer_bytes, first_task, state_bytes
from clmoe.plan.cost import GB, MFU, Card, answers_asked, card, downloads
from clmoe.plan.fit import fit
from clmoe.sequence import chosen
from clmoe.train.task import prepare_request, train_task
from tests.runs import Runs
from tests.support import TASKS, load_script, tiny_config


def of_size(memory: float) -> Card:
    """A card with this many usable bytes."""
    return Card("test", math.ceil(memory / 0.9), 1e12)


def first_of(config: Config) -> FirstTask:
    return first_task(method_class(config.method)(config))


@pytest.mark.parametrize(
    ("text", "name", "memory", "rate"),
    [
        ("24GB", "RTX 4090", 24e9, 165e12),
        ("24", None, 0, 0),
        ("22.5 GiB", "RTX 4090", 22.5 * 2**30, 165e12),
        ("80GB", "A100", 80e9, 312e12),
        ("h100", "H100", 80e9, 989e12),
        ("RTX-3090", "RTX 3090", 24e9, 71e12),
        ("1000GB", "B200", 1e12, 2250e12),
        ("0GB", None, 0, 0),
        ("A1000", None, 0, 0),
    ],
)
def test_cards(text: str, name: str | None, memory: float, rate: float) -> None:
    if name is None:
        with pytest.raises(ClmoeError, match=text):
            card(text)
    else:
        found = card(text)
        assert (found.memory, found.rate) == (memory, rate) and name in found.name


@pytest.mark.parametrize("deepspeed", [None, "zero2"])
def test_the_cheapest_settings_that_fit_are_taken(deepspeed: str | None, tiny_folder: Path) -> None:
    """``fit`` takes the first combination that fits, ordered by bits, then recomputation, offloading, micro-batch."""
    config = tiny_config("clmoe", tiny_folder, "training.batch_size=8")
    types = [
        ("float32", False, False),
        ("bfloat16", False, False),
        ("bfloat16", True, False),
        ("bfloat16", False, True),
    ]
    zeros = [deepspeed] if deepspeed is None else ["zero2", "zero2_offload"]
    options = []
    for level, (dtype, eight, four) in enumerate(types):
        values = f"model.dtype={dtype}", f"model.load_in_8bit={eight}", f"model.load_in_4bit={four}"
        first = first_of(tiny_config("clmoe", tiny_folder, *values))
        for again, (rank, zero), micro in itertools.product((False, True), enumerate(zeros), (8, 4, 2, 1)):
            activations = activation_bytes(first, micro, first.image.tokens + 256, again)
            size = sum(state_bytes(first, 1, zero).values()) + activations
            options.append(((level, again, rank, -micro), size, zero))
    sizes = sorted({size for _, size, _ in options})
    taken = set()
    for usable in [*sizes[:: max(1, len(sizes) // 12)], sizes[-1]]:
        order, size, zero = min(option for option in options if option[1] <= usable)
        found = fit(config, [], of_size(usable), deepspeed=deepspeed)
        assert (found.planned, found.deepspeed, found.fits) == (size, zero, True)
        taken.add(order[:3])
        again = load_config("clmoe", {}, ["training.batch_size=8", *found.settings], str(tiny_folder))
        dtype, eight, four = types[order[0]]
        assert (again.model.dtype, again.model.load_in_8bit, again.model.load_in_4bit) == (dtype, eight, four)
        assert again.training.gradient_checkpointing == order[1]
        assert again.training.micro_batch_size == -order[3]
    assert len(taken) > 3
    nothing = fit(config, [], of_size(sizes[0] - 1024), deepspeed=deepspeed)
    assert not nothing.fits and nothing.planned == sizes[0]


def test_what_the_user_sets_stays(tiny_folder: Path) -> None:
    given = ["training.batch_size=8", "training.micro_batch_size=4", "training.gradient_checkpointing=false"]
    config = tiny_config("lora", tiny_folder, *given)
    least = fit(config, given, of_size(1)).settings
    assert {pair.split("=")[0] for pair in least} == {"model.dtype", "model.load_in_4bit"}
    fixed = [*given, "model.dtype=float32"]
    found = fit(config, fixed, of_size(1))
    assert found.settings == [] and not found.fits
    assert ": does not fit, and no setting is left to change (planned peak" in found.line
    with pytest.raises(ClmoeError, match="--fit"):
        fit(load_config("zero_shot", {}, [], str(tiny_folder)), [], of_size(1))


def test_batches_of_questions_fit_too() -> None:
    """``--fit`` also lowers evaluation.batch_size: with 7B, the keys and values of 64 questions exceed a 24 GB card."""
    config = load_config("lora", {}, [], "llava-1.5-7b")
    found = fit(config, [], card("24GB"))
    (asked,) = [int(pair.split("=")[1]) for pair in found.settings if pair.startswith("evaluation.batch_size")]
    first = first_of(config)
    sizes = [answer_bytes(first, n, 832, 128) for n in (asked, 2 * asked)]
    assert sizes[0] <= found.usable < sizes[1]
    cache = 2 * 32 * 2 * 4096 * 64 * (832 + 128)  # bytes of keys and values
    assert answer_bytes(first, 64, 832, 128) > 2 * first.base_parameters + cache


def test_a_run_is_the_one_with_the_settings_by_hand(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["training.batch_size=8", "training.steps=2", "model.dtype=float32"]
    where = {"order": TASKS[0], "base": str(runs.model), "data": None}
    config = chosen("lora", str(runs.benchmark), settings, **where)[1]  # type: ignore[arg-type]
    first = first_of(config)
    least = sum(state_bytes(first).values()) + activation_bytes(first, 1, first.image.tokens + 256, False)
    size = f"--fit={math.ceil(least / 0.9) / GB:.9f}GB"
    line = ["run", "lora", str(runs.benchmark), "--base", str(runs.model), "--order", TASKS[0], *settings]
    cli.main([*line, size, "--output", str(tmp_path / "fitted")])
    said = capsys.readouterr().err
    assert "training.micro_batch_size=1" in said and "GiB" in said
    by_hand = [pair for pair in said.split("--fit")[1].split("(planned")[0].split() if "=" in pair]
    cli.main([*line, *by_hand, "--output", str(tmp_path / "hand")])
    for name in ("adapter_model.safetensors", "config.yaml"):
        files = [(tmp_path / run / f"01_{TASKS[0]}" / name).read_bytes() for run in ("fitted", "hand")]
        assert files[0] == files[1]
    with pytest.raises(SystemExit, match="2"):
        cli.main([*line, "--fit", "0.001GB", "--output", str(tmp_path / "none")])
    assert "--fit" in capsys.readouterr().err and not (tmp_path / "none").exists()


def plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = 0
    try:
        cli.main(["plan", *map(str, arguments), "--json"])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, json.loads(capsys.readouterr().out)


def test_a_plan_says_fits_and_hours(capsys: pytest.CaptureFixture[str], runs: Runs) -> None:
    where = ("--config", "lora", "--benchmark", runs.benchmark, "--model", runs.model, "training.steps=3")
    code, values = plan(capsys, *where, "--fit", "24GB", "--gpus", 2, "--mfu", 0.3)
    assert code == 0 and values["card"]["fits"]
    for name, flops in values["flops"].items():
        assert values["card"]["hours"][name] == pytest.approx(flops / (0.3 * 165e12 * 2) / 3600)
    one = values["flops"]["100,000 records"] / 100_000
    assert values["flops"]["training"] == pytest.approx(one * 8 * 3 * len(TASKS))
    code, values = plan(capsys, *where, "--fit", "0.001GB")
    assert code == 1 and not values["card"]["fits"] and values["card"]["mfu"] == MFU
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", *map(str, where), "--fit", "24GB", "--mfu", "40"])


def test_answers_are_counted_as_a_sequence_asks_them() -> None:
    """``answers_asked`` equals the sum over the cells that a sequence asks, written out cell by cell."""
    tasks, sets = [(5, 5), (100, 10), (7, 7)], [(30, 10), (8, 8)]
    assert answers_asked(tasks) == 5 + (5 + 10) + (5 + 100 + 7)
    general = (5 + 100 + 7 + 38) + (5 + 10 + 18) + (5 + 10 + 7 + 18) + (5 + 100 + 7 + 38)
    assert answers_asked(tasks, sets) == general
    assert answers_asked([(112, 22)]) == 112 and answers_asked([(112, 22)], sets) == 2 * (112 + 38)


def test_what_to_fetch_is_a_line_for_a_shell(tmp_path: Path) -> None:
    (tmp_path / "COCO2014/val2014").mkdir(parents=True)
    benchmark = load_benchmark("coin", tmp_path, check_files=False)
    model, *data = downloads(benchmark, "llava-hf/llava-1.5-7b-hf", 7_063_427_072)
    assert model == "hf download llava-hf/llava-1.5-7b-hf  # 14.1 GB"
    assert len(data) == len(benchmark.sources) - 1
    coco = tmp_path / "COCO2014"
    url = "http://images.cocodataset.org/zips/train2014.zip"
    fetch = f"curl -L --create-dirs --output-dir {coco} -O {url} && unzip -d {coco} {coco}/train2014.zip  # (13 GB)"
    assert fetch in data, "the archive holds the folder train2014"
    assert f"hf download Zacks-Chen/CoIN --repo-type dataset --local-dir {tmp_path}/Instructions" in data
    assert all(line.startswith(("curl ", "hf ", "# ")) for line in data)
    assert downloads(benchmark, "x/y", None) == data


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "llava_cmoe"])
def test_the_table_of_cards_is_up_to_date(method: str) -> None:
    """The table, which `python scripts/hardware_page.py` writes, has the rows that two of its six methods give now."""
    page = load_script("hardware_page")
    lines = page.PAGE.read_text().splitlines(keepends=True)
    assert page.HEAD.splitlines(keepends=True)[0] in lines
    assert all(page.row(setup, "llava-1.5-7b", method) in lines for setup in page.SETUPS)
    assert page.base_row({"lora": "Gemma-3-4B", "llava_cmoe": "Qwen2.5-VL-3B"}[method], "24GB") in lines


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_memory_of_answers_at_true_width(shared: bool, tmp_path: Path) -> None:
    """The plan bounds the peak, counted tensor by tensor for two layers and four questions of 640 tokens in bfloat16.

    Matrix products are left out.
    """
    rehearse = load_script("bench/rehearse")
    (tmp_path / "config.json").write_text(json.dumps(rehearse.cut("llava-1.5-7b", 2)))
    first = first_of(load_config("lora", {}, ["model.dtype=bfloat16"], str(tmp_path)))
    planned = answer_bytes(first, 4, 640, 8) - first.base_bytes - 2 * first.count()
    with rehearse.Alive(False) as alive, torch.no_grad():
        loaded = meta_base(tmp_path / "config.json")
        base = loaded.model.to(torch.bfloat16).to_empty(device="cpu")
        for tensor in (*base.parameters(), *base.buffers()):
            tensor.fill_(0.01) if tensor.is_floating_point() else tensor.copy_(torch.arange(tensor.numel())[None])
        images, length = (2, 600) if shared else (4, 640)
        ids = torch.full((images, length), 5)
        ids[:, 2 : 2 + loaded.image_token_count] = base.config.image_token_index
        pixels = torch.randn(images, 3, 336, 336).bfloat16()
        prompts: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        if shared:
            rests = torch.full((4, 40), 6)
            rest = {"input_ids": rests, "attention_mask": torch.ones_like(rests)}
            prompts = SharedPrompts(prompts, rest, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2]))
        before = alive.most = alive.now
        prefill(base, prompts, NEWEST_ROUTER, 8)
    measured = alive.most - before
    assert (0.3 if shared else 0.75) * planned < measured < planned


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["lora", "clmoe"])
def test_a_base_in_few_bits_stays_as_it_is(method: str, bits: int, runs: Runs, tmp_path: Path) -> None:
    """Training on a CPU changes no bit of the base; the adapter is float32, and the checkpoint records the bits."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'clmoe[4bit]'")
    settings = [f"model.load_in_{bits}bit=true", "model.dtype=bfloat16", "training.gradient_checkpointing=true"]
    where = {"order": TASKS[0], "base": str(runs.model), "data": None}
    benchmark, config, order = chosen(method, str(runs.benchmark), settings, **where)  # type: ignore[arg-type]
    base = load_base(config.model)
    small = decoder_layers(base.model)[0].mlp.up_proj.weight
    assert small.dtype == (torch.uint8 if bits == 4 else torch.int8)
    assert sum(t.nbytes for t in base.model.parameters()) == pytest.approx(first_of(config).base_bytes, rel=0.05)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    request = prepare_request(config, benchmark, TASKS[0], order, None, tmp_path / "run/01")
    trained = train_task(request, base)
    assert trained is base
    after = {name.replace("base_layer.", ""): t for name, t in base.model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name in after)
    assert len(before.keys() & after.keys()) > 0.9 * len(before)
    adapter = load_file(tmp_path / "run/01/adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert f"load_in_{bits}bit: true" in (tmp_path / "run/01/config.yaml").read_text()
