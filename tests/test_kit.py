"""The GPU kit's own arithmetic and its table; `scripts/gpu_kit.sh --smoke` runs the kit's parts."""

import json
from pathlib import Path

import pytest
import torch

from clmoe.bases.llava import meta_base
from clmoe.config import load_config
from clmoe.experts.model import attach_adapter
from clmoe.methods import method_class
from clmoe.plan import first_task
from clmoe.plan.cost import step_flops
from clmoe.train.loop import TrainedModel
from tests.bases import tiny_families
from tests.support import load_script, tiny_config

clock, kit, rehearse = (load_script(f"bench/{name}") for name in ("clock", "kit", "rehearse"))


def test_flops_of_a_step_at_7b() -> None:
    """``step_flops`` equals a count by hand, for 640 tokens.

    Forward, linears take 8.29 TF, head 0.17, attention 0.11, tower 0.35.
    """
    first = first_task(method_class("lora")(load_config("lora", {}, [], "llava-1.5-7b")))
    sizes = first.shapes, first.image
    found = step_flops(*sizes, 1, 640, 640, 0, tuned=False)
    tower = 0.35e12 + 24 * 4 * 577**2 * 1024  # with its attention, which 0.35e12 leaves out
    assert found == pytest.approx(2 * 8.29e12 + 2 * 0.17e12 + 3 * 0.107e12 + tower + 2 * 576 * 4096 * 5120, rel=2e-3)
    experts = step_flops(*sizes, 1, 640, 640, 32 * 32 * 3 * (4096 + 11008), tuned=False) - found
    again = step_flops(*sizes, 1, 640, 640, 10**8, tuned=False, recompute=True)
    again -= step_flops(*sizes, 1, 640, 640, 10**8, tuned=False)
    assert again == pytest.approx(8.29e12 + 0.107e12 + 2 * 640 * 1e8, rel=2e-3), "the blocks' forward pass, once more"
    assert experts / (4 * 640 * 32 * 3 * 4096 * 11008) == pytest.approx(5.02e-4 * 32, rel=1e-3)  # relative to the FFN


@pytest.mark.parametrize(
    ("method", "family"),
    [("lora", "llava"), ("moelora", "llava"), *(("moelora", name) for name in tiny_families.FAMILIES)],
)
def test_flops_are_those_that_torch_counts(method: str, family: str, tiny_folder: Path, tmp_path: Path) -> None:
    """``step_flops`` agrees with torch's count, apart from attention, which torch's counter leaves out on a CPU."""
    folder = tiny_folder if family == "llava" else tiny_families.save_family(family, tmp_path)
    config = tiny_config(method, folder, "adapter.train_projector=true")
    kind, base = method_class(method)(config), meta_base(folder / "config.json")
    model = base.model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.normal_(0, 0.1) if tensor.is_floating_point() else tensor.copy_(rehearse.numbered(tensor))
    first, samples, tokens, answers = first_task(kind), 2, 100, 32
    trained = TrainedModel(attach_adapter(model, kind.adapter(base)), kind, samples).train()
    inputs = dict(rehearse.batch(config, base, samples, tokens))
    counted = clock.flops(lambda: trained(**inputs)["loss"].backward())
    adapter, s, image = first.count("expert") + first.count("router"), first.shapes, first.image
    ours = step_flops(s, image, samples, tokens, answers, adapter, tuned=True)
    squares = 3 * 2 * samples * tokens**2 * s.queries * s.L
    squares += 4 * samples * image.tiles * (image.patches // image.tiles + 1) ** 2 * s.tower * s.tower_blocks
    assert ours - squares == pytest.approx(counted, rel=0.01 if family == "llava" else 0.05)


def test_the_rehearsals_products_are_rounded_once() -> None:
    """A bfloat16 product wider than a piece of the weight is the float64 one rounded once, but for a few ties."""
    a, b, c = (torch.randn(*shape).bfloat16() for shape in ((300, 1100), (1100, 1600), (300, 1600)))
    product, added = a.double() @ b.double(), c.double()
    with rehearse.Widened():
        found = [a @ b, torch.addmm(c, a, b, beta=0.5, alpha=2), c.clone().addmm_(a, b, alpha=0.25)]
    for ours, exact in zip(found, (product, 0.5 * added + 2 * product, added + 0.25 * product), strict=True):
        assert (ours != exact.bfloat16()).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("card", "rate"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12)]
)
def test_peaks_are_found_by_the_cards_name(card: str, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "device_name", lambda: card)
    assert clock.peak_rate(torch.bfloat16) == rate


def test_a_part_that_is_cut_leaves_what_it_has(tmp_path: Path) -> None:
    record = kit.Record("g", tmp_path)
    record.add(steps=10, nonfinite=0)
    with record.trying("norm"):
        raise RuntimeError("no\nluck")
    values = json.loads((tmp_path / "g.json").read_text())
    assert values["figures"] == {"steps": 10.0, "nonfinite": 0.0} and values["error"] == "cut"
    assert values["skipped"] == {"norm": "failed: RuntimeError: no luck"}
    assert [path.name for path in tmp_path.iterdir()] == ["g.json"]


def test_the_table_shows_figures_reasons_and_what_is_missing(tmp_path: Path) -> None:
    record = kit.Record("g", tmp_path)
    record.add(steps=200, nonfinite=float("nan"), first_loss=1.5)
    record.skip(["norm"], "skipped: no card")
    record.end(None)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{kit.BEGIN}old\n{kit.END}after\n")
    kit.fill(tmp_path, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| g | steps / non-finite values | 200 / nan |" in text and "1.5 / not measured" in text
    assert "skipped: no card / not measured / not measured" in text
    found = kit.problems(kit.read(tmp_path))
    assert "g: nonfinite is nan" in found and not any("norm" in problem for problem in found)
    missing = {(part, key) for part, _, keys, _ in kit.ROWS for key in keys} - {("g", k) for k in ("steps", "norm")}
    assert len(found) == len(missing) - 1  # first_loss


def test_the_page_has_every_row() -> None:
    page = kit.PAGE.read_text(encoding="utf-8")
    rows = page.partition(kit.BEGIN)[2].partition(kit.END)[0].splitlines()
    shown = [tuple(cell.strip() for cell in row.split("|")[1:3]) for row in rows if row.startswith("| ")][1:]
    assert shown == [(part, what) for part, what, _, _ in kit.ROWS]
