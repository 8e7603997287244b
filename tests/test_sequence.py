"""`clmoe run` makes a whole sequence in one program, wherever it is stopped; every locator works with every method."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import clmoe
from clmoe import cli
from clmoe import sequence as sequence_module
from clmoe.benchmarks.base import load_benchmark
from clmoe.errors import ClmoeError
from clmoe.evaluate import answer as answer_module
from clmoe.evaluate import run as evaluation_module
from clmoe.evaluate.relocate import relocate, usable_locators
from clmoe.methods import method_class
from clmoe.plan import make_plan
from clmoe.sequence import Result, default_folder
from clmoe.train import task as task_module
from clmoe.train.checkpoint import verify
from clmoe.train.loop import TaskTrainer
from clmoe.utils.tensors import same_bits
from tests.methods.test_contract import ROWS
from tests.runs import FAST, Killed, Runs, contents, tensors, texts
from tests.support import TASKS

UNCOMPARED = ("events.jsonl", "timing.json")
PARTS = {
    "separate": (),
    "clmoe": ("options.consolidation=none",),
    "llava_cmoe": ("options.probe_min_steps=2",),
    "disco": (),
    "hide": ("options.variant=released",),
    "smolora": (),
    "modalprompt": (),
    "mrlora": ("options.stored=2", "options.router_rank=8", "options.router_epochs=1"),
}


def run(runs: Runs, output: Path, method: str, *settings: str, order: str = "norm", seed: int = 0) -> Result:
    """Call ``clmoe.run`` from Python, as users do."""
    return clmoe.run(
        method, str(runs.benchmark), order=order, seed=seed, output=output, base=str(runs.model), settings=settings
    )


def compared(folder: Path) -> dict[str, bytes]:
    """The contents of all files except those that hold times."""
    return {name: content for name, content in contents(folder).items() if name not in UNCOMPARED}


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run of CL-MoE on three tasks, which loads the base only once; tests never change it."""
    loads: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (task_module, answer_module):
            real = module.load_base
            patch.setattr(module, "load_base", lambda *args, real=real: loads.append(args) or real(*args))
        result = run(runs, tmp_path_factory.mktemp("sequence") / "clmoe", "clmoe")
    assert len(loads) == 1
    return result


def test_it_is_task_by_task_training_and_evaluation(whole: Result, runs: Runs, tmp_path: Path) -> None:
    """`clmoe train` and `clmoe eval`, each from a checkpoint folder to the next, give the same bits as `clmoe run`."""
    by_hand = runs.chain("clmoe", tasks=TASKS)
    for checkpoint, other in zip(whole.checkpoints, by_hand, strict=True):
        assert contents(checkpoint) == contents(other)
        runs.evaluate(other, tmp_path)
    for name, content in compared(tmp_path).items():
        if not name.startswith("features/"):
            assert (whole.run / name).read_bytes() == content, name
    assert texts(tmp_path, TASKS[2], *TASKS)


def test_the_result_is_the_runs_tables(whole: Result) -> None:
    assert whole.matrix.tasks == TASKS
    assert (whole.run / "matrix.csv").read_text().splitlines()[-1].startswith(f"{TASKS[2]},")
    last = whole.matrix.row(TASKS[2])
    assert whole.metrics["last"] == pytest.approx(sum(value or 0 for value in last) / 3)
    assert clmoe.load(whole.checkpoints[-1]).answer(None, "How many things are there?", max_new_tokens=2)


def test_the_same_line_again_finds_everything_done(whole: Result, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [path for path in whole.run.rglob("*") if path.is_file() and path.name != "run.json"]  # each row writes it
    before = [path.stat().st_mtime_ns for path in files]
    for module in (task_module, answer_module):
        monkeypatch.setattr(module, "load_base", lambda *args: pytest.fail("the base was loaded"))
    free = ("training.micro_batch_size=4", "training.save_steps=7", "evaluation.batch_size=5")
    for settings in ((), free):
        assert run(runs, whole.run, "clmoe", *settings).metrics == whole.metrics
    assert "spent.json" in {path.name for path in files} and [path.stat().st_mtime_ns for path in files] == before


def at_call(number: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """``real``, except that call ``number``, counted from 1, raises Killed."""
    calls: list[None] = []

    def armed(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == number:
            raise Killed
        return real(*args, **kwargs)

    return armed


@pytest.mark.slow
def test_stopped_anywhere_the_same_line_ends_in_the_same_bytes(
    whole: Result, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed while it trains or publishes the second task, evaluates after it, or between tasks ends the same."""
    moments: list[tuple[Any, str, int]] = [
        (TaskTrainer, "training_step", 6),
        (task_module, "publish", 1),
        (answer_module.Answerer, "generate", 1),
        (evaluation_module, "write_tables", 1),
        (sequence_module, "prepare_request", 3),
    ]
    for holder, name, number in moments:
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, at_call(number, getattr(holder, name)))
            with pytest.raises(Killed):
                run(runs, tmp_path / "run", "clmoe")
    run(runs, tmp_path / "run", "clmoe")
    assert compared(tmp_path / "run") == compared(whole.run)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"settings": ["options.gamma=0.5"]}, "options.gamma 0.7 there, 0.5 here"),
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"settings": ["locator=oracle"]}, "locator.name prototype there, oracle here"),
        ({"settings": ["evaluation.limit=3"]}, "evaluation.limit None there, 3 here"),
        ({"order": "rev"}, "order"),
    ],
)
def test_the_same_folder_with_another_option_is_refused_and_kept(
    settings: dict[str, Any], named: str, whole: Result, runs: Runs
) -> None:
    before = contents(whole.run)
    given = {"base": str(runs.model), "output": whole.run, **settings}
    with pytest.raises(ClmoeError) as refused:
        clmoe.run("clmoe", str(runs.benchmark), **given)
    assert named in str(refused.value) and str(whole.run) in str(refused.value)
    assert contents(whole.run) == before


def test_restart_begins_a_run_anew_that_has_finished_no_task(
    whole: Result, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"base": str(runs.model), "output": tmp_path / "run", "order": ",".join(TASKS[:1])}
    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "training_step", at_call(3, TaskTrainer.training_step))
        with pytest.raises(Killed):
            clmoe.run("clmoe", str(runs.benchmark), seed=7, **given)
    with pytest.raises(ClmoeError, match=r"seed 7 there, 0 here.*--restart"):
        clmoe.run("clmoe", runs.benchmark, **given)
    made = clmoe.run("clmoe", runs.benchmark, restart=True, **given)
    assert contents(made.checkpoints[0]) == contents(whole.checkpoints[0])
    with pytest.raises(ClmoeError, match="seed 0 there, 8 here"):
        clmoe.run("clmoe", runs.benchmark, seed=8, restart=True, **given)  # its first task is finished


def with_file(benchmark: Path, folder: Path, task: int, kind: str, text: str) -> str:
    """Write a benchmark to ``folder`` that differs in one file of one task; return its YAML."""
    values = yaml.safe_load(benchmark.read_text())
    (folder / f"{kind}.json").write_text(text)
    values["tasks"][task][kind] = str(folder / f"{kind}.json")
    (folder / "mini.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "mini.yaml")


def test_changed_training_data_are_named(runs: Runs, mini_yaml: Path, tmp_path: Path) -> None:
    rows = (mini_yaml.parent / TASKS[0] / "train.json").read_text()
    given: dict[str, Any] = {"base": str(runs.model), "output": tmp_path / "run", "settings": ["training.steps=1"]}
    clmoe.run("lora", with_file(mini_yaml, tmp_path, 0, "train", rows), **given, order=TASKS[0])
    with pytest.raises(ClmoeError, match=rf"train\.{TASKS[0]}"):
        changed = rows.replace("Which", "What")
        clmoe.run("lora", with_file(mini_yaml, tmp_path, 0, "train", changed), **given, order=TASKS[0])


@pytest.mark.slow
def test_a_sequence_can_be_made_longer(runs: Runs, whole: Result, tmp_path: Path) -> None:
    run(runs, tmp_path / "run", "clmoe", order=TASKS[0])
    longer = run(runs, tmp_path / "run", "clmoe", order=",".join(TASKS))
    assert [verify(folder) for folder in longer.checkpoints] == [verify(folder) for folder in whole.checkpoints]


@pytest.mark.parametrize(("method", "checkpoints"), [("zero_shot", 0), ("multitask", 1), ("moelora", 3)])
def test_every_way_of_chaining_ends_in_a_table(method: str, checkpoints: int, runs: Runs, tmp_path: Path) -> None:
    result = run(runs, tmp_path / "run", method, "training.steps=1", *ROWS[method].overrides)
    assert len(result.checkpoints) == checkpoints
    assert None not in result.matrix.row(TASKS[2])


def test_general_ability_and_the_next_task_are_asked_where_wanted_and_change_nothing_else(
    runs: Runs, mini_yaml: Path, tmp_path: Path
) -> None:
    """``before`` asks the last task's questions under another name, so both must get the same scores."""
    values = yaml.safe_load(mini_yaml.read_text())
    before = {name: value for name, value in values["tasks"][2].items() if name not in ("name", "train")}
    values |= {"general": [{"name": "before", **before}]}
    values["recipe"]["evaluation"] = {"general": False}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    mine = dataclasses.replace(runs, benchmark=tmp_path / "mine.yaml")
    fast = ("training.steps=1", "adapter.train_projector=false")
    plain, asked = (run(mine, tmp_path / name, "lora", *fast) for name in ("plain", "asked"))
    assert compared(plain.run) == compared(asked.run)
    asked = run(mine, asked.run, "lora", *fast, "evaluation.general=true")
    new = {name for name in compared(asked.run).keys() - compared(plain.run).keys() if "predictions" not in name}
    assert new == {"general.csv"}
    changed = {name for name, content in compared(plain.run).items() if compared(asked.run)[name] != content}
    assert changed == {"matrix.csv", "metrics.json"}
    rows = {line.split(",")[0]: line.split(",")[1] for line in (asked.run / "general.csv").read_text().splitlines()}
    assert rows.pop("after") == "before" and list(rows) == ["zero_shot", *TASKS]
    side = {after: asked.matrix.row(after)[2] for after in ("zero_shot", *TASKS)}
    assert side.pop(TASKS[0]) is None, "it is not the next task"
    assert {after: float(rows[after]) for after in side} == side
    assert asked.matrix.row(TASKS[0])[1] is not None
    assert asked.metrics["fwt_n_minus_1"] is not None and plain.metrics["fwt_n_minus_1"] is None
    assert asked.metrics["general_change"] == pytest.approx(float(rows[TASKS[2]]) - float(rows["zero_shot"]))
    at_once = run(mine, tmp_path / "at_once", "lora", *fast, "evaluation.general=true")
    for name in ("matrix.csv", "general.csv", "metrics.json", f"03_{TASKS[2]}/adapter_model.safetensors"):
        assert (at_once.run / name).read_bytes() == (asked.run / name).read_bytes(), name
    known: dict[str, Any] = {"order": "norm", "base": str(runs.model), "data": None}
    pairs = [*fast, "evaluation.general=true"]
    benchmark, config, order = sequence_module.chosen("lora", str(mine.benchmark), pairs, **known)
    planned = make_plan(method_class("lora")(config), benchmark, order)["flops"]
    answers = sum(len(file.read_text().splitlines()) for file in (at_once.run / "predictions").rglob("*.jsonl"))
    assert planned["answers"] == pytest.approx(answers * planned["100,000 answers"] / 100_000)


def test_a_locator_chooses_for_a_question_that_belongs_to_no_task_and_the_oracle_is_not_asked(
    runs: Runs, mini_yaml: Path, tmp_path: Path
) -> None:
    settings = ("training.steps=1", "adapter.train_projector=false", "evaluation.general=true")
    order = ",".join(TASKS[:2])
    known = run(runs, tmp_path / "oracle", "separate", *settings, order=order)
    assert known.matrix.row("zero_shot") != (None, None)
    assert known.matrix.row(TASKS[0])[1] is None and known.metrics["fwt_n_minus_1"] is None
    runs.evaluate(known.checkpoints[0], known.run, "evaluation.general=true", locator="last", order=order)
    cell = known.run / "predictions" / TASKS[0] / f"{TASKS[1]}.last"
    assert {json.loads(line)["task"] for line in cell.with_suffix(".last.jsonl").read_text().splitlines()} == {TASKS[0]}
    assert json.loads(cell.with_suffix(".last.json").read_text())["located"] is None


@pytest.mark.slow
@pytest.mark.parametrize("method", PARTS)
def test_every_locator_works_with_every_method_that_keeps_parts(method: str, runs: Runs, tmp_path: Path) -> None:
    """Every locator works on the checkpoints of one training without training again, and finds only known tasks."""
    settings = ("training.steps=2", "adapter.train_projector=false", *PARTS[method])
    trained = run(runs, tmp_path / "run", method, *settings, *FAST["vae"], "locator=vae", order=",".join(TASKS[:2]))
    names, benchmark = usable_locators(method), load_benchmark(str(runs.benchmark))
    for found in relocate(trained.run, benchmark, names, tmp_path / "features", {}):
        named = {task: dict(counts) for task, counts in found.confusion.items()}
        assert named.keys() == set(TASKS[:2]) and all(sum(counts.values()) == 12 for counts in named.values())
        assert all(counts.keys() <= set(TASKS[:2]) for counts in named.values()), found.locator
        if found.locator == "oracle":
            assert named == {task: {task: 12} for task in TASKS[:2]}
        elif found.locator == "last":
            assert named == {task: {TASKS[1]: 12} for task in TASKS[:2]}


def test_a_locator_of_its_own_is_what_training_with_it_gives(runs: Runs, tmp_path: Path) -> None:
    """A locator fitted after training from the tasks' data decides like the one that training sealed in."""
    settings = ("training.steps=1", "adapter.train_projector=false")
    order = ",".join(TASKS[:2])
    other = run(runs, tmp_path / "oracle", "separate", *settings, order=order)
    sealed = run(runs, tmp_path / "prototype", "separate", *settings, "locator=prototype", order=order)
    runs.evaluate(other.checkpoints[1], tmp_path / "later", locator="prototype", order=order)
    mine = (tmp_path / "later" / "locator.csv").read_text()
    assert mine.splitlines()[1:] == (sealed.run / "locator.csv").read_text().splitlines()[2:]


def test_separate_keeps_each_tasks_lora(runs: Runs, tmp_path: Path) -> None:
    """The second checkpoint holds the first one's LoRA and the LoRA that the second task gives when trained first."""
    order = ",".join(TASKS[:2])
    frozen = "adapter.train_projector=false"
    both = run(runs, tmp_path / "both", "separate", frozen, order=order)
    alone = run(runs, tmp_path / "alone", "separate", frozen, order=TASKS[1])
    first, second, only = (tensors(folder) for folder in (*both.checkpoints, *alone.checkpoints))
    for name, value in second.items():
        half = value.shape[0] // 2 if name.endswith("A") else value.shape[1] // 2
        older, newer = (value[:half], value[half:]) if name.endswith("A") else (value[:, :half], value[:, half:])
        assert same_bits(older.contiguous(), first[name]), name
        assert same_bits(newer.contiguous(), only[name]), name
    assert both.metrics["bwt_n"] == 0, "the oracle forgets nothing"


MY_METHOD = '''
from clmoe.methods.lora import Lora

class Mine(Lora):
    """Sequential LoRA under another name."""

METHODS = {"mine": Mine}
'''


def test_a_method_of_the_users_own_file(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "my_method.py").write_text(MY_METHOD)
    (tmp_path / "my_lora.yaml").write_text("extends: lora\nlabel: mine\n")
    settings = ("training.steps=1", "adapter.targets=[gate_proj, up_proj, down_proj]")
    mine = run(runs, tmp_path / "a", str(tmp_path / "my_method.py"), *settings, order=TASKS[0])
    named = run(runs, tmp_path / "b", str(tmp_path / "my_lora.yaml"), *settings, order=TASKS[0])
    for name, value in tensors(named.checkpoints[0]).items():
        assert same_bits(tensors(mine.checkpoints[0])[name], value), name


def test_the_command_line(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`clmoe run` works from another folder, with relative paths and with settings among the options."""
    monkeypatch.chdir(tmp_path)
    fixed = ["run", "lora", str(runs.benchmark), "--base", str(runs.model), "training.steps=1", "--order", TASKS[0]]
    cli.main([*fixed, "--seed", "3", "adapter.rank=4"])
    shown = capsys.readouterr().out
    folder = Path("runs") / "mini" / next(path.name for path in (tmp_path / "runs" / "mini").iterdir())
    assert folder == default_folder("mini", "lora", TASKS[0], 3)
    assert f"1/1 after {TASKS[0]}: " in shown and str(folder) in shown
    with pytest.raises(SystemExit) as stop:
        cli.main([*fixed, "--seed", "3", "adapter.rank=8"])
    assert stop.value.code == 2 and "adapter.rank 4 there, 8 here" in capsys.readouterr().err


def test_bad_files_of_later_tasks_stop_it_before_the_first_step_all_at_once(
    runs: Runs, mini_yaml: Path, tmp_path: Path
) -> None:
    """One error names every bad file: broken, unscorable, without an image, too long, or with an end token."""
    root = tmp_path / "own"
    shutil.copytree(mini_yaml.parent, root)
    long = json.loads((root / TASKS[0] / "train.json").read_text())
    long[4]["conversations"][0]["value"] += " is it" * 2000
    question = json.loads((root / TASKS[0] / "test.json").read_text())[0]
    written = {
        f"{TASKS[0]}/train.json": json.dumps(long),
        f"{TASKS[0]}/test.json": json.dumps([question | {"text": "What?</s>"}]),
        f"{TASKS[1]}/train.json": '[{"id": ',
        f"{TASKS[1]}/test.json": '[{"question_id": "1", "text": "What?"}]',
        f"{TASKS[2]}/test.json": json.dumps([question | {"image": "gone.png"}]),
        f"{TASKS[2]}/images/3.png": "no picture",
    }
    for name, text in written.items():
        (root / name).write_text(text)
    (root / "mini.yaml").write_text(mini_yaml.read_text().replace(f"root: {mini_yaml.parent}", "root: ."))
    with pytest.raises(ClmoeError) as caught:
        clmoe.run("lora", str(root / "mini.yaml"), base=str(runs.model), output=tmp_path / "run")
    named = [line.split(": ")[0].removeprefix(f"{root}/") for line in str(caught.value).splitlines()]
    assert sorted(named) == sorted(written)
    assert not list((tmp_path).glob("run/0*"))


@pytest.mark.slow
def test_a_sweep_runs_every_combination_and_goes_on_after_a_stop(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--base", str(runs.model), "--output", str(tmp_path / "out"), "--order", ",".join(TASKS[:2])]
    sweep = ["run", "clmoe", str(runs.benchmark), *where, "--set", "options.gamma=0.3,0.7", "--seeds", "0,1"]
    with monkeypatch.context() as patch:
        patch.setattr(task_module, "publish", at_call(4, task_module.publish))
        with pytest.raises(Killed):
            cli.main([*sweep, "training.steps=1"])
    stopped = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(stopped) > 3
    capsys.readouterr()
    cli.main([*sweep, "training.steps=1"])
    printed = capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in stopped.items() if "/.0" not in str(path))
    assert len(list((tmp_path / "out").iterdir())) == 4
    for gamma in ("0.3", "0.7"):
        label = f"clmoe options.gamma={gamma}"
        for seed in (0, 1):
            (folder,) = (tmp_path / "out").glob(f"*-options.gamma={gamma}-seed{seed}")
            recorded = json.loads((folder / "sequence.json").read_text())
            assert (recorded["seed"], recorded["options"]["gamma"], recorded["label"]) == (seed, float(gamma), label)
        last = [json.loads((p / "metrics.json").read_text())["last"] for p in (tmp_path / "out").glob(f"*{gamma}-*")]
        assert (
            f"{label}     2 " in printed and f"{sum(last) / 2:.2f} ± {abs(last[0] - last[1]) / 2**0.5:.2f}" in printed
        )


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--set", "options.gamma=0.3,1.7"], "options.gamma"),  # the second of the values, before the first is run
        (["--set", "options.gama=1"], "gama"),
        (["--set", "options.gamma"], "--set options.gamma"),
        (["--set", "options.gamma=[0.3"], "--set options.gamma"),
        (["--set", "options.gamma=1", "options.gamma=0"], "--set options.gamma"),
        (["--set", "seed=1,2"], "--set seed"),
        (["--seeds", "0,1", "seed=2"], "--seeds"),
        (["--seed", "0", "seed=2"], "--seed"),
        (["--seeds", "0,x"], "--seeds"),
    ],
)
def test_a_wrong_sweep_is_refused_before_its_first_run(
    wrong: list[str], named: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "clmoe", str(runs.benchmark), "--output", str(tmp_path / "out"), *wrong])
    assert stop.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_every_verb_takes_the_seed_by_the_same_option(runs: Runs, tmp_path: Path) -> None:
    given: dict[str, str] = {"order": TASKS[0], "seed": "5"}
    by_option = runs.train(tmp_path / "a" / "x", "lora", TASKS[0], "training.steps=1", **given)
    by_key = runs.train(tmp_path / "b" / "x", "lora", TASKS[0], "training.steps=1", "seed=5", order=TASKS[0])
    assert contents(by_option) == contents(by_key)
    assert "seed: 5\n" in (by_option / "config.yaml").read_text()
