"""Parts of the GPU kit (scripts/gpu_kit.sh runs them all), and the kit's table in docs/performance.md.

    python scripts/bench/kit.py run OUT PART... [--smoke]     writes OUT/PART.json, again with every figure
    python scripts/bench/kit.py fill OUT [PAGE]               writes the figures of OUT's files into the page's table
    python scripts/bench/kit.py check OUT                     fails unless all parts ended with finite figures

Needs torch, transformers, peft and Pillow, and no network. With --smoke it runs as if `ABSENT` were not installed.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import MagicMock, patch

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs/performance.md"
BEGIN, END = "<!-- gpu kit: filled by scripts/bench/kit.py -->\n", "<!-- end of gpu kit -->\n"
NOT_MEASURED = "not measured"
RANKS = (32, 64, 512)
ABSENT = {name: name for name in ("datasets", "pyarrow", "pandas", "matplotlib", "sentencepiece")}
ABSENT |= {"sklearn": "scikit-learn"}  # module -> package, for those that clmoe needs and a CUDA image lacks
STAND_INS = (
    "datasets",
    "datasets.arrow_writer",
    "pyarrow",
    "pyarrow.parquet",
    "sklearn",
    "sklearn.covariance",
    "sentencepiece",
)
METHODS = ("lora", "olora", "moelora", "clmoe", "clmoe_released", "llava_cmoe")


def by_rank(key: str) -> list[str]:
    return [f"r{rank}_{key}" for rank in RANKS]


STEP = ("step_s", "tokens_per_s", "mfu_percent", "peak_gib", "planned_gib")
FORMS = {f.replace(", ", "_"): f"{f}" for f in ("batched, exact", "shared, exact", "batched, fast", "shared, fast")}
ROWS: list[tuple[str, str, list[str], str]] = [
    ("a", "frozen FFN, ms, R 32 / 64 / 512", by_rank("frozen_ms"), ""),
    ("a", "FFN with experts over frozen FFN", by_rank("packed_over_frozen"), "1.11 at R 32; the FLOPs alone 1.016"),
    ("a", "the same, product recomputed", by_rank("again_over_frozen"), ""),
    ("a", "published loop over frozen FFN", by_rank("loop_over_frozen"), ""),
    ("a", "adapter's time, loop : ours", by_rank("adapter_loop_over_packed"), "at least 5"),
    ("a", "peft's LoRA (float32) over frozen FFN", by_rank("peft_over_frozen"), ""),
    ("a", "peft's LoRA (bfloat16) over frozen FFN", by_rank("peft_16_over_frozen"), ""),
    ("a", "compiled: FFN with experts over frozen FFN", by_rank("packed_compiled_over_frozen"), ""),
    ("a", "compiled: peft's LoRA (bfloat16), R 32", ["r32_peft_16_compiled_over_frozen"], ""),
    *(
        ("b", f"`{m}`: step s / tokens per s / MFU % / peak GiB / planned GiB", [f"{m}_{kind}" for kind in STEP], goal)
        for m, goal in ((m, "" if m == "lora" else "MFU within 5 points of `lora`'s") for m in METHODS)
    ),
    ("c", "kept beyond the frozen FFN, MB: ours", by_rank("packed_mb"), ""),
    ("c", "ours, product recomputed", by_rank("again_mb"), ""),
    ("c", "published loop", by_rank("loop_mb"), ""),
    ("c", "peft's LoRA, float32", by_rank("peft_mb"), ""),
    ("c", "loop : ours, product recomputed", by_rank("loop_over_again"), "at least 20"),
    ("d", "one by one, questions per s", ["one_by_one_per_s"], ""),
    *(("d", f"{form}: questions per s / times faster", [f"{k}_per_s", f"{k}_times"], "") for k, form in FORMS.items()),
    ("e", "task known / located / located again, s", ["known_s", "located_s", "kept_s"], ""),
    ("e", "located over known / features kept", ["located_over_known", "kept_over_known"], ""),
    ("e", "eight VAEs' scores of all questions, s / a VAE's fit on 500 features, s", ["scores_s", "fit_s"], ""),
    ("f", "bfloat16 in 24 GiB: largest micro-batch / peak GiB", ["bf16_batch", "bf16_gib"], ""),
    ("f", "4-bit in 24 GiB: largest micro-batch / peak GiB / state GiB", ["nf4_batch", "nf4_gib", "nf4_state_gib"], ""),
    ("g", "steps / non-finite values", ["steps", "nonfinite"], "no non-finite value"),
    ("g", "loss, first / last ten steps", ["first_loss", "last_loss"], ""),
    ("g", "largest gradient norm / peak GiB after 10 steps / at the end", ["norm", "early_gib", "late_gib"], "flat"),
    ("h", "SDPA's default against eager: relative difference of logits / times faster", ["sdpa", "sdpa_times"], "0.02"),
    ("h", "SDPA's flash kernel", ["kernel", "kernel_times"], "0.02"),
    ("h", "package flash-attn", ["package", "package_times"], "0.02"),
    ("h", "wait for DDP's mean of gradients behind a delayed stream, over the delay", ["hook_wait"], "1"),
]
"""Part, what is shown, its figures, and the goal."""


class Record:
    """A part's JSON, written again with every figure, so that a cut part keeps what it has."""

    def __init__(self, part: str, out: Path) -> None:
        self.path = out / f"{part}.json"
        self.started = time.monotonic()
        versions = {name: _version(name) for name in ("torch", "transformers", "peft", "triton", "flash-attn")}
        self.values: dict[str, Any] = {"part": part, "versions": versions, "figures": {}, "skipped": {}, "error": "cut"}
        self.write()

    def add(self, prefix: str = "", **figures: float) -> None:
        self.values["figures"] |= {f"{prefix}{name}": float(value) for name, value in figures.items()}
        self.write()

    def skip(self, keys: list[str], why: str) -> None:
        self.values["skipped"] |= dict.fromkeys(keys, " ".join(why.split())[:200])
        self.write()

    @contextmanager
    def trying(self, *keys: str) -> Iterator[None]:
        """A fault inside leaves these figures out, with the reason; what follows still runs."""
        try:
            yield
        except TimeoutError:
            raise
        except Exception as error:
            self.skip([*keys], f"failed: {type(error).__name__}: {error}")

    def end(self, error: str | None) -> None:
        self.values |= {"error": error}
        self.write()

    def write(self) -> None:
        self.values["seconds"] = round(time.monotonic() - self.started, 1)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.values, indent=1) + "\n")
        partial.replace(self.path)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def replaced(modules: dict[str, Any]) -> Iterator[None]:
    """Inside, imports find these; for None, they find nothing."""
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules |= modules
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)
        sys.modules |= before


def stand_ins(*names: str) -> AbstractContextManager[None]:
    """Inside, packages that are not installed can be imported; what is imported of them must not be used."""
    absent = [name for name in names if find_spec(name.split(".")[0]) is None]
    return replaced(dict.fromkeys(absent, MagicMock()))


@contextmanager
def bare() -> Iterator[None]:
    """Inside, the packages of ``ABSENT`` can be neither imported nor found."""

    def found(package: str) -> str:
        if package in ABSENT.values():
            raise PackageNotFoundError(package)
        return version(package)

    with replaced(dict.fromkeys(ABSENT)), patch("importlib.metadata.version", found):
        yield


def run(part: str, out: Path, smoke: bool) -> int:
    """Measure a part; returns the exit code. SIGTERM ends it with what it has."""

    def cut(number: int, frame: object) -> NoReturn:
        raise TimeoutError("cut by SIGTERM: the part's time was up")

    signal.signal(signal.SIGTERM, cut)
    out.mkdir(parents=True, exist_ok=True)
    record = Record(part, out)
    try:
        with bare() if smoke else nullcontext():
            import_module("transformers.trainer")  # looks for datasets itself, and must not find the stand-in
            sys.path[:0] = [str(REPOSITORY)]
            with stand_ins(*STAND_INS):
                parts = import_module("kit_parts")
            record.values |= {"device": parts.device_name(), "smoke": smoke}
            parts.PARTS[part](record, parts.Sizes.smoke() if smoke else parts.Sizes())
    except BaseException as error:
        record.end(f"{type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}")
        print(f"{part}: {record.values['error']}", file=sys.stderr)
        return 1
    record.end(None)
    print(f"{part}: {record.values['seconds']} s, {len(record.values['figures'])} figures")
    return 0


def read(out: Path | None) -> dict[str, dict[str, Any]]:
    """Part -> its JSON, of the parts that have one."""
    files = [] if out is None else sorted(out.glob("[a-h].json"))
    return {path.stem: json.loads(path.read_text()) for path in files}


def table(parts: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown; what has no figure says why, or ``not measured``."""
    lines = ["| part | what | figure | goal |", "|---|---|---|---|"]
    for part, what, keys, goal in ROWS:
        found = parts.get(part, {"figures": {}, "skipped": {}})
        cells = [
            f"{found['figures'][key]:.4g}" if key in found["figures"] else found["skipped"].get(key, NOT_MEASURED)
            for key in keys
        ]
        lines.append(f"| {part} | {what} | {cells[0] if len(set(cells)) == 1 else ' / '.join(cells)} | {goal} |")
    made_by = sorted({f"{v.get('device')}, torch {v['versions']['torch']}" for v in parts.values()})
    return "\n".join([*lines, "", f"Measured on: {'; '.join(made_by) or 'nothing yet'}.", ""])


def fill(out: Path | None, page: Path) -> None:
    """Replace the table between the page's marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(read(out))}\n{END}{after}", encoding="utf-8")


def problems(parts: dict[str, dict[str, Any]]) -> list[str]:
    """What is missing, failed or not finite; figures that a part skips for lack of a package do not count."""
    found = [f"{part}: {values['error']}" for part, values in parts.items() if values["error"]]
    for part, _, keys, _ in ROWS:
        values = parts.get(part, {"figures": {}, "skipped": {}})
        for key in keys:
            why, figure = values["skipped"].get(key, ""), values["figures"].get(key)
            if figure is None and (not why or why.startswith("failed")):
                found.append(f"{part}: {key}: {why or NOT_MEASURED}")
            elif figure is not None and not math.isfinite(figure):
                found.append(f"{part}: {key} is {figure}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run")
    for verb in (running, verbs.add_parser("fill"), verbs.add_parser("check")):
        verb.add_argument("out", type=Path)
    running.add_argument("parts", nargs="+", choices=[*"abcdefgh"])
    running.add_argument("--smoke", action="store_true", help="tiny sizes")
    verbs.choices["fill"].add_argument("page", type=Path, nargs="?", default=PAGE)
    args = parser.parse_args()
    if args.verb == "run":
        sys.exit(max([run(part, args.out, args.smoke) for part in args.parts]))
    if args.verb == "fill":
        fill(args.out, args.page)
    elif found := problems(read(args.out)):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
