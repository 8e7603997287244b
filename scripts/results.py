"""Makes docs/results.md from run folders: ``python scripts/results.py [FOLDER ...]``.

FOLDER holds run folders of scripts/grid.py (runs/grid/BENCHMARK). The small files of every complete run there are
copied to docs/results/runs/BENCHMARK, with the dates, commit and command of its events; the page is made from that
copy, so that anybody can make it again. A test compares the page with what this makes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clmoe.benchmarks.base import load_benchmark
from clmoe.errors import ClmoeError
from clmoe.evaluate.matrix import mean_spread
from clmoe.report.grid import default_file, read_grids
from clmoe.report.paired import ENOUGH_SEEDS, Difference, difference, verdict
from clmoe.report.run import Group, group_runs, read_run
from clmoe.report.tables import BLANK, Table, has_row, show_count, show_spread, to_markdown
from clmoe.utils.logging import read_events

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, RUNS, PAPER = DOCS / "results.md", DOCS / "results" / "runs", DOCS / "results" / "paper.yaml"
BENCHMARKS = ("playground-coin", "playground-cl4vqa")
VERDICT_NAMES = ("holds", "contradicted", "no difference shown", "not verified", "not run")
SMALL = ("run.json", "matrix.csv", "immediate.csv", "parameters.csv", "locator.csv", "timing.json")
HEAD = """\
# Results

Made by `python scripts/results.py`: what was measured from the run folders in [results/runs](results/runs), what the
papers print and claim from [results/paper.yaml](results/paper.yaml). Everything was measured on the embedded benchmark:
56-pixel images, a LLaVA of 1.6 million parameters, 200 steps per task; batch, learning rate and scale are the same for
every method, what they train and store is not, and LLaVA-CMoE's experts have learned before the first task. It shows
which effects exist at that scale, not what a 7B model would score. Percent; mean ± sample standard deviation over
seeds. What the figures mean, and the surprises that were looked into, are in [results/README](results/README.md).

"""
VERDICTS = """\
**holds**: the difference is above zero with 95 % confidence, paired by seed (Student's t). **contradicted**: below
zero. **no difference shown**: zero is inside the interval. **not verified**: fewer than three seeds. **not run**: not
measured. With three seeds the interval is wide, 4.3 standard errors to each side. Each comparison stands by itself:
among forty differences that do not exist, two would be expected outside their interval, one to each side.

"""


@dataclass(frozen=True)
class Measured:
    """One benchmark's groups by label, and where and when each was run."""

    benchmark: str
    groups: dict[str, Group]

    @property
    def tasks(self) -> tuple[str, ...]:
        return next((run.order for group in self.groups.values() for run in group.runs), ())


def collect(folder: Path) -> int:
    """Copy the small files of the complete runs in ``folder``; returns how many runs.

    Raises:
        ClmoeError: a run with another number of steps than the benchmark's recipe says.
    """
    copied = 0
    for path in sorted(folder.glob("*-seed*")):
        if not (path / "run.json").is_file():
            continue
        run = read_run(path)
        if not run.complete:
            continue
        steps = load_benchmark(run.benchmark, check_files=False).recipe["training"]["steps"]
        if run.steps_per_task not in (0, steps):
            raise ClmoeError(f"{path}: {run.steps_per_task} steps per task; the page compares runs of {steps}")
        target = RUNS / run.benchmark / path.name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in SMALL:
            if (path / name).is_file():
                shutil.copy(path / name, target / name)
        (target / "provenance.json").write_text(json.dumps(_provenance(path), indent=1) + "\n", encoding="utf-8")
        copied += 1
    return copied


def _provenance(path: Path) -> dict[str, Any]:
    """Dates, commits and first command of a run, from its events; the command says RUN and, for its runs, OUT."""
    events = read_events(path / "events.jsonl")
    started = [event for event in events if event["event"] == "started"]
    command = started[0]["command"] if started else None
    for folder, name in ((path.resolve(), "RUN"), (path.resolve().parent, "OUT")):
        command = command and command.replace(str(folder), name)
    return {
        "dates": sorted({event["time"][:10] for event in events}),
        "commits": sorted({event["commit"] for event in started if event["commit"]}),
        "command": command,
    }


def measured(benchmark: str) -> Measured:
    """All runs of a benchmark that are kept here."""
    folders = sorted((RUNS / benchmark).glob("*-seed*"))
    return Measured(benchmark, {group.label: group for group in group_runs(folders)} if folders else {})


def claims_table(paper: dict[str, Any], results: list[Measured]) -> Table:
    """Every claim against every benchmark."""
    rows = []
    for claim in paper["claims"]:
        for other in claim["than"]:
            cells = [_claim_cell(claim, other, result) for result in results]
            rows.append((claim["paper"], claim["where"], claim["claim"].format(other), *cells))
    return Table("Claims", ("paper", "where", "claim", *(r.benchmark for r in results)), tuple(rows), keys=3)


def _claim_cell(claim: dict[str, Any], other: str, result: Measured) -> str:
    first, second = (result.groups.get(label) for label in (claim["better"], other))
    if first is None or second is None:
        return "not run"
    if claim.get("less"):
        first, second = second, first
    found = difference(first, second, claim["metric"])
    return f"{verdict(found)}{_interval(found)}"


def _tally(claims: Table) -> str:
    """How many comparisons ended how, a line per benchmark."""
    lines = []
    for column in range(claims.keys, len(claims.header)):
        counts = Counter(row[column].split(",")[0].split(" (")[0] for row in claims.rows)
        told = ", ".join(f"{name} {counts[name]}" for name in VERDICT_NAMES if counts[name])
        lines.append(f"- {claims.header[column]}: {len(claims.rows)} comparisons: {told}.\n")
    return "".join(lines) + "\n"


def _interval(found: Difference | None) -> str:
    if found is None:
        return ""
    if found.n < ENOUGH_SEEDS or found.low is None or found.high is None:
        return f", {found.mean:+.1f}"
    return f", {found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def task_rows(result: Measured, labels: list[str]) -> Table:
    """LLaVA-CMoE's Table 1: each task right after its training and at the end. The task is known in the first
    row, where a method finds tasks."""
    rows = []
    for group in (result.groups[label] for label in labels if label in result.groups):
        known = group.metric("immediate_known").mean is not None
        immediate, bwt = ("immediate_known", "bwt_known") if known else ("immediate", "bwt_n")
        for kind, name in ((immediate, "Immediate"), ("last", "Last")):
            if not has_row(group, kind):
                continue
            cells = [show_spread(group.task_score(kind, task), len(group.seeds)) for task in result.tasks]
            transfer = show_spread(group.metric(bwt), len(group.seeds)) if name == "Last" else ""
            mean = show_spread(group.metric(kind), len(group.seeds))
            rows.append((group.label, name, *cells, mean, transfer))
    header = ("method", "", *result.tasks, "Mean", "BWT")
    return Table(f"{result.benchmark}: Immediate and Last", header, tuple(rows), keys=2)


def summary_rows(result: Measured, labels: list[str], paper: dict[str, Any]) -> Table:
    """CL-MoE's Table 1: AP and AF, with what they cost; and the papers' figures where they are at hand."""
    rows = []
    for label in labels:
        group = result.groups.get(label)
        figures = paper["figures"].get(label, {})
        printed = f"{figures['last']:.2f} / {figures['bwt_known']:.2f}" if figures else "not at hand"
        if group is None:
            rows.append((label, "0", *[BLANK] * 6, printed))
            continue
        n = len(group.seeds)
        metrics = [
            show_spread(group.metric(name), n) for name in ("last", "forgetting_max", "bwt_n_minus_1", "immediate")
        ]
        counts = [
            show_spread(group.field(name), n, show_count) for name in ("trainable_parameters", "adapter_parameters")
        ]
        rows.append((label, str(n), *metrics, *counts, printed))
    header = (
        "method",
        "seeds",
        "AP",
        "AF",
        "bwt_n_minus_1",
        "right after training",
        "parameters trained in the last task",
        "in the adapter at the end",
    )
    return Table(f"{result.benchmark}: AP and AF", (*header, "paper: Last / BWT, 7B"), tuple(rows))


def head_start(result: Measured) -> str:
    """What LLaVA-CMoE had learned before the first task: what was stored after it and not trained in it."""
    runs = result.groups["llava_cmoe"].runs if "llava_cmoe" in result.groups else ()
    first = [run.parameters[0] for run in runs if run.parameters]
    if not first:
        return ""
    before = show_spread(mean_spread([task.stored - task.trainable for task in first]), len(first), show_count)
    return (
        f"llava_cmoe has a start that no other method here has: {before} parameters, its initial experts and their "
        "routers, learned from warm-up data (the base's neutral mixture) before the first task.\n\n"
    )


def section_rows(result: Measured, title: str, labels: list[str]) -> Table | None:
    """One ablation: each variant beside the first, and its difference from it in the end."""
    groups = [result.groups[label] for label in labels if label in result.groups]
    if len(groups) < 2 or groups[0].label != labels[0]:
        return None
    rows = []
    for group in groups:
        n = len(group.seeds)
        metrics = [show_spread(group.metric(name), n) for name in ("last", "immediate", "forgetting_max")]
        found = None if group is groups[0] else difference(group, groups[0], "last")
        parameters = show_spread(group.field("trainable_parameters"), n, show_count)
        rows.append((group.label, str(n), *metrics, _interval(found).removeprefix(", "), parameters))
    header = (
        "variant",
        "seeds",
        "last",
        "immediate",
        "AF",
        "last: difference from the first (95 %)",
        "trained in the last task",
    )
    return Table(title, header, tuple(rows))


def origin_rows(result: Measured) -> Table:
    """Date, commit and (of the newest run) command of every row."""
    rows = []
    for label, group in sorted(result.groups.items()):
        kept = [json.loads((run.path / "provenance.json").read_text(encoding="utf-8")) for run in group.runs]
        dates = sorted({date for entry in kept for date in entry["dates"]})
        commits = sorted({commit for entry in kept for commit in entry["commits"]})
        when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        newest = max(kept, key=lambda entry: entry["dates"])["command"]
        command = f"`{newest}`" if newest else "not recorded"
        rows.append((label, " ".join(map(str, group.seeds)), when, ", ".join(commits) or "not recorded", command))
    return Table("Origin", ("row", "seeds", "date", "commit", "command of the newest run"), tuple(rows))


def results_page() -> str:
    """The whole page; the same bytes from the same files."""
    paper = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    grids = read_grids(default_file())
    results = [measured(benchmark) for benchmark in BENCHMARKS]
    methods = [row.label for row in grids["table1"].rows]
    claims = claims_table(paper, results)
    parts = [HEAD, "## Which claims hold at this scale\n\n", _tally(claims), VERDICTS, to_markdown(claims), "\n"]
    parts += ["Cannot be checked here:\n\n", *(f"- {line}\n" for line in paper["unchecked"]), "\n"]
    counts = tuple((entry["what"], entry["paper"], entry["ours"]) for entry in paper["counts"])
    parts += [
        "Checked on the shapes of the 7B model alone:\n\n",
        to_markdown(Table("", ("count", "paper", "ours"), counts)),
        "\n",
    ]
    for result in results:
        parts.append(f"## All methods on {result.benchmark}\n\n")
        parts.append("As in CL-MoE's table (AP is `last`, AF `forgetting_max`):\n\n")
        parts += [to_markdown(summary_rows(result, methods, paper)), "\n", head_start(result)]
        parts.append("As in LLaVA-CMoE's Table 1 (Immediate with the task known, where a method finds tasks):\n\n")
        parts += [to_markdown(task_rows(result, methods)), "\n"]
        if len(set(methods) & set(result.groups)) > 1:
            parts.append(f"![Accuracy after each task](results/{result.benchmark}/forgetting.png)\n\n")
            parts.append(f"![Accuracy matrices](results/{result.benchmark}/comparison.png)\n\n")
        parts.append(_run_line(result, methods))
    for name in ("clmoe", "llava_cmoe"):
        parts += _ablations(
            grids[name].title, name, {t: [r.label for r in rs] for t, rs in grids[name].sections.items()}, results
        )
    parts.append("## Where every row comes from\n\n")
    for result in results:
        if result.groups:
            parts += [f"{result.benchmark}:\n\n", to_markdown(origin_rows(result)), "\n"]
    return "".join(parts).rstrip("\n") + "\n"


def pictures(result: Measured, labels: list[str]) -> list[Path]:
    """Matrices side by side, and accuracy on the tasks so far after each task, beside the page."""
    from clmoe.report import plots

    groups = [result.groups[label] for label in labels if label in result.groups]
    if len(groups) < 2:
        return []
    folder = DOCS / "results" / result.benchmark
    folder.mkdir(parents=True, exist_ok=True)
    return [
        plots.comparison_heat_maps(groups, folder / "comparison.png"),
        plots.forgetting_curves(groups, folder / "forgetting.png"),
    ]


def _run_line(result: Measured, labels: list[str]) -> str:
    """How many of the table's runs were made, and the command."""
    missing = [label for label in labels if label not in result.groups]
    text = f"`python scripts/grid.py table1 --benchmark {result.benchmark}`"
    return f"{text}; not run: {', '.join(missing)}.\n\n" if missing else f"{text}.\n\n"


def _ablations(title: str, name: str, sections: dict[str, list[str]], results: list[Measured]) -> list[str]:
    parts = [f"## {title}\n\n"]
    for result in results:
        labels = list(dict.fromkeys(label for group in sections.values() for label in group))
        missing = [label for label in labels if label not in result.groups]
        parts.append(f"`python scripts/grid.py {name} --benchmark {result.benchmark}`")
        parts.append(f"; not run: {', '.join(missing)}.\n\n" if missing else ".\n\n")
        for section, rows in sections.items():
            found = section_rows(result, section, rows)
            if found is not None:
                parts += [f"### {section}: {result.benchmark}\n\n", to_markdown(found), "\n"]
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    try:
        for folder in parser.parse_args().folders:
            print(f"{folder}: {collect(folder)} complete runs copied")
    except ClmoeError as error:
        parser.exit(2, f"results: {error}\n")
    PAGE.write_text(results_page(), encoding="utf-8")
    labels = [row.label for row in read_grids(default_file())["table1"].rows]
    drawn = [path for benchmark in BENCHMARKS for path in pictures(measured(benchmark), labels)]
    print(*(PAGE, *drawn), sep="\n")


if __name__ == "__main__":
    main()
