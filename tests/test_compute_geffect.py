"""compute_geffect.py, basher2.py, geffect.every and the library's calls, as a user types them, with the tiny model."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT, make_workplace, run_in
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import compute_geffect
import forget
import unlearn.reporting.figures
from app.compose import given
from app.door import cli
from app.methods import choices
from app.settings import GEffects
from unlearn.geffect.call import GEffectCallback, geffect, meter_of
from unlearn.geffect.target import Wanted
from unlearn.objectives.functions import ga, mean_nll
from unlearn.objectives.loss import Loss
from unlearn.objectives.rows import tokenize_pairs

pytestmark = pytest.mark.on_cpu  # commands go on with what was measured in this process, to the same bits

RUN = "icml/tiny/npo_kl_0.0008_forget05_5_0.0_None"
LAST = f"model_path_cur={RUN}/checkpoint-6"
RISKS = ["unlearn", "retain"]


def call(job: Callable[[Any], Any], config: str, place: Path, words: str, figures: bool = False) -> None:
    """What a script does with these settings in that folder, in this process.

    Args:
        figures: draw them, which takes longer than measuring what they show: only where a test looks at them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        if not figures:
            patch.setattr(unlearn.reporting.figures, "draw", lambda folder: [])
        job(given(config, words.split()))


measure = partial(call, compute_geffect.run, "forget_ge")
unlearn_split = partial(call, forget.run, "forget")


@pytest.fixture(scope="module")
def place(young: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with a fine-tuned model and one run of npo_kl in its folder, measured by basher2."""
    folder = make_workplace(tmp_path_factory.mktemp("geffect"))
    (folder / "data/weight").mkdir(parents=True)
    (folder / "data/weight/ft_epoch40_lr0.001_tiny_full_wd0.0").symlink_to(young)
    unlearn_split(folder, "model_family=tiny split=forget05 method=npo retain=kl")
    done = run_in(folder, "python basher2.py npo_kl --model=tiny --setting=forget05")
    (folder / "log.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def everything(place: Path) -> Path:
    """The folder of all tables of that run's last step."""
    sweep = "ga,wga:1,npo_kl:0.5,rmu_2:3,idk,gd:2"
    measure(place, f"{LAST} save_dir=all tokens=true positions=true sweep=[{sweep}]", figures=True)
    return place / "all/geffect"


def table(folder: Path, name: str) -> pd.DataFrame:
    file = folder / f"{name}.parquet"
    return pd.read_parquet(file) if file.exists() else pd.read_csv(folder / f"{name}.csv", float_precision="round_trip")


def totals(folder: Path) -> pd.Series:
    return table(folder, "steps").set_index(["step", "risk"])["geffect"]


# ---- basher2 ----


def test_the_log_has_two_lines_a_checkpoint_and_nothing_else(place: Path) -> None:
    lines = (place / "log.txt").read_text().splitlines()
    assert len(lines) == 2 * 3  # step 0, 5 and 6
    expected = totals(place / RUN / "geffect")
    for number, line in enumerate(lines):
        found = re.fullmatch(r"ge ([ur]) \| (\S+) (\{.*\})", line)
        assert found is not None
        groups = ast.literal_eval(found[3])
        assert list(groups) == ["embed", "module1", "module2", "module3", "lm"]
        assert sum(groups.values()) == pytest.approx(float(found[2]), rel=1e-12)
        step, risk = [0, 5, 6][number // 2], RISKS[number % 2]
        assert risk[0] == found[1]
        assert float(found[2]) == pytest.approx(expected[step, risk], rel=1e-9)


def test_the_groups_are_thirds_of_the_layers() -> None:
    import compute_geffect

    layers = pd.DataFrame({"layer": ["embed", *map(str, range(30)), "norm", "lm_head"], "geffect": 1.0})
    assert compute_geffect.by_group(layers) == {"embed": 1, "module1": 10, "module2": 10, "module3": 10, "lm": 2}
    layers = pd.DataFrame({"layer": ["embed", "embed", *map(str, range(4)), "lm_head"], "geffect": 1.0})
    assert compute_geffect.by_group(layers) == {"embed": 2, "module1": 2, "module2": 1, "module3": 1, "lm": 1}


@pytest.mark.parametrize("tables", ["all", RUN])
def test_every_table_has_its_columns_and_adds_up(place: Path, everything: Path, tables: str) -> None:
    folder = place / tables / "geffect"
    columns = {
        "steps": "step,risk,geffect,cosine,objective_norm,risk_norm,risk_value,update_effect",
        "layers": "step,risk,layer,module,geffect",
        "updates": "step,risk,layer,module,update_effect",
        "instances": "step,risk,row,geffect",
        "tokens": "step,risk,row,position,token_id,token,loss,geffect",
        "positions": "step,risk,row,position,layer,geffect",
        "prediction": "step,next_step,risk,minus_lr_geffect,update_effect,risk_change",
    }
    expected = totals(folder)
    scale = expected.abs().groupby("step").max()
    for name, header in columns.items():
        if (name in ("updates", "prediction") and tables == "all") or (name in ("tokens", "positions") and tables == RUN):
            continue
        found = table(folder, name)
        assert ",".join(found.columns) == header
        if "geffect" in found and name != "steps":
            off = (found.groupby(["step", "risk"])["geffect"].sum() - expected).abs() / scale
            assert off.max() < (1e-3 if name == "tokens" else 1e-9), name  # float32: another pass
    rows = table(folder, "instances")
    assert set(rows["row"]) == {*map(str, range(20)), "retain"}
    assert set(table(folder, "layers")["layer"]) == {"embed", *"0123", "norm", "lm_head"}


def test_the_updates_add_up(place: Path) -> None:
    folder = place / RUN / "geffect"
    updates = table(folder, "updates").groupby(["step", "risk"])["update_effect"].sum()
    steps = table(folder, "steps").set_index(["step", "risk"])["update_effect"]
    assert steps.isna().to_dict() == {key: key[0] == 6 for key in steps.index}
    assert (updates - steps.dropna()).abs().max() < 1e-9


def test_the_prediction_is_what_was_measured(place: Path) -> None:
    folder = place / RUN / "geffect"
    risk = table(folder, "steps").set_index(["step", "risk"])["risk_value"]
    rates = {line["step"]: line["learning_rate"] for line in map(json.loads, (place / RUN / "logs/train.jsonl").open())}
    for line in table(folder, "prediction").itertuples():
        assert line.risk_change == pytest.approx(risk[line.next_step, line.risk] - risk[line.step, line.risk])
        eta = sum(rates[step] for step in range(line.step + 1, line.next_step + 1))
        assert line.minus_lr_geffect == pytest.approx(-eta * totals(folder)[line.step, line.risk])
    last = table(folder, "prediction").set_index(["step", "risk"]).loc[5]  # a single training step
    assert (last["update_effect"] * last["risk_change"] > 0).all()


def test_the_figures_are_there_and_drawn_again_from_the_tables(place: Path, everything: Path) -> None:
    names = {
        place / RUN / "geffect/figures": ["instances", "layers", "prediction", "steps", "updates"],
        everything / "figures": ["instances", "layers", "objectives", "steps", "sweep", "tokens"],
    }
    for figures, expected in names.items():
        found = sorted(file.name for file in figures.iterdir())
        assert found == sorted(f"{name}.{kind}" for name in expected for kind in ("pdf", "png"))
    shutil.rmtree(everything / "figures")
    assert unlearn.reporting.figures.main([str(everything.parent)]) == 0
    assert sorted(file.name for file in (everything / "figures").iterdir()) == found


def test_started_again_it_prints_the_same_and_measures_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (place / RUN / "geffect/steps.csv").read_bytes()
    measure(place, f"model_path_cur={RUN}")
    out, err = capsys.readouterr()
    assert "0 of them measured now" in err
    assert out == (place / "log.txt").read_text()
    assert (place / RUN / "geffect/steps.csv").read_bytes() == before


@pytest.mark.parametrize(
    "moment",
    [
        "unlearn.geffect.tables.write 6 after",
        "unlearn.geffect.meter.Meter.tapped 3 after",
    ],  # step 5's tables half written; step 6
)
def test_killed_in_the_middle_it_goes_on_to_the_same_tables(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    words = f"model_path_cur={place / RUN} save_dir={tmp_path}"
    kill = shlex.quote("kill -KILL $PID")
    killed = run_in(place, f"python {ROOT}/tests/at.py {moment} {kill} {ROOT}/compute_geffect.py {words}", check=False)
    assert killed.returncode == -9
    assert 0 < len(killed.stdout.splitlines()) < 6
    measure(place, words)
    out, err = capsys.readouterr()
    assert out == (place / "log.txt").read_text()
    assert re.search(r"3 steps, [12] of them measured now", err)
    for name in ("steps", "layers", "instances", "updates", "prediction"):
        assert (tmp_path / f"geffect/{name}.csv").read_bytes() == (place / RUN / f"geffect/{name}.csv").read_bytes(), name


def test_tables_of_other_weights_are_refused(place: Path, tmp_path: Path) -> None:
    """The run's last checkpoint overwritten after it was measured."""
    run = tmp_path / "run"
    shutil.copytree(place / RUN, run)
    measure(place, f"model_path_cur={run}")  # the same weights elsewhere: nothing to refuse
    tables = {file: file.read_bytes() for file in (run / "geffect").iterdir() if file.is_file()}
    shutil.copy(run / "checkpoint-5/model.safetensors", run / "checkpoint-6/model.safetensors")
    refused = re.escape(f"{run}/geffect has the G-effects of other weights at step 6; remove it, or give save_dir=FOLDER")
    for folder in (run, run / "checkpoint-6"):
        with pytest.raises(ValueError, match=f"^{refused}$"):
            measure(place, f"model_path_cur={folder} save_dir={run}")
    measure(place, f"model_path_cur={run}/checkpoint-5")  # another step's are what they were
    assert {file: file.read_bytes() for file in tables} == tables


def test_no_such_run(place: Path) -> None:
    done = run_in(place, "python basher2.py ga --model=tiny --setting=forget05 --hyper=3", check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "ga_0.0008_forget05_5_0.0_3: no such run; there are icml/tiny/npo_kl_0.0008_forget05_5_0.0_None" in done.stderr


# ---- compute_geffect ----


def test_one_checkpoint_as_the_run_has_it(place: Path, tmp_path: Path) -> None:
    """The seed's command; what it does not say comes from the run. Its update goes to the next checkpoint."""
    original = "data/weight/ft_epoch40_lr0.001_tiny_full_wd0.0"
    where = f"model_path={original} model_path_cur={RUN}/checkpoint-5 save_dir={tmp_path}"
    said = "model_family=tiny split=forget05 method=npo retain=kl"
    measure(place, f"{said} {where} batch_size=7")
    found, expected = (table(folder, "steps") for folder in (tmp_path / "geffect", place / RUN / "geffect"))
    expected = expected[expected["step"] == 5].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4)
    record = yaml.safe_load((tmp_path / "geffect/config.yaml").read_text())
    assert set(record) == {"settings", "hash", "data", "models", "versions", "device", "precision"}
    assert record["settings"]["method"]["name"] == "npo"


@pytest.mark.parametrize("way", ["instances=false", "dtype=float64", "dtype=bfloat16 weights=bfloat16 norms=false"])
def test_other_ways_have_the_same_totals(place: Path, tmp_path: Path, way: str) -> None:
    measure(place, f"{LAST} save_dir={tmp_path} {way}")
    found, expected = (totals(folder / "geffect")[6] for folder in (tmp_path, place / RUN))
    assert ((found - expected).abs() / expected.abs().max()).max() < (0.1 if "bfloat16" in way else 1e-4)
    assert (tmp_path / "geffect/instances.csv").exists() == (way != "instances=false")
    assert table(tmp_path / "geffect", "steps")["cosine"].isna().all() == ("norms=false" in way)


def test_a_sweep_has_what_is_measured_alone(place: Path, everything: Path) -> None:
    """The run's own objective, and that of a method with a layer of its own."""
    swept = table(everything, "sweep").set_index(["method", "risk"])["geffect"]
    assert swept.index.get_level_values(0).unique().tolist() == ["ga", "wga", "npo_kl", "rmu_2", "idk", "gd"]
    measure(place, f"{LAST} save_dir=rmu method=rmu method.layer=2 hyper_param=3")
    for method, folder in {"npo_kl": RUN, "rmu_2": "rmu"}.items():
        expected = totals(place / folder / "geffect")[6]
        assert ((swept[method] - expected).abs() / expected.abs().max()).max() < 1e-3, method


def test_a_sweep_of_all(place: Path, everything: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every method at its default, but those that this model, these rows or one pass can't have and that are told."""
    measure(place, f"{LAST} save_dir={tmp_path} instances=false sweep=[all,wga:1]")
    without = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sweep=all: without ")]
    left_out = {line.split()[2].rstrip(":") for line in without}
    assert {"altpo", "task_vector", "rmu", "circuit_breakers"} <= left_out
    assert all("method.layer=" in line or "rows lack: generated" in line or "task_vector" in line for line in without)
    swept = table(tmp_path / "geffect", "sweep")
    defaults = swept[swept["hyper_param"].isna()].set_index(["method", "risk"])["geffect"]
    assert set(defaults.index.get_level_values(0)) == set(choices("method")) - left_out
    assert len(swept) == len(defaults) + 2
    before = table(everything, "sweep").set_index(["method", "risk"])["geffect"]
    for method in ("ga", "idk"):
        assert defaults[method].tolist() == pytest.approx(before[method].tolist(), rel=1e-4)
    assert given("forget_ge", ["sweep=all"]).sweep == "all"


def test_a_sweep_is_added_to(place: Path, everything: Path, tmp_path: Path) -> None:
    """What stands there stays, as do the other tables; what is measured again is not there twice."""
    shutil.copytree(everything, tmp_path / "geffect")
    before = {name: table(everything, name) for name in ("sweep", "tokens", "positions")}
    measure(place, f"{LAST} save_dir={tmp_path} sweep=[ga,wga:1,wga:5]")
    after = table(tmp_path / "geffect", "sweep")
    new = (after["method"] == "wga") & (after["hyper_param"] == 5)
    assert list(after[new]["risk"]) == RISKS
    order = ["method", "hyper_param", "risk"]
    old, kept = (part.sort_values(order, ignore_index=True) for part in (before["sweep"], after[~new]))
    pd.testing.assert_frame_equal(kept, old, rtol=1e-5)
    for name in ("tokens", "positions"):
        pd.testing.assert_frame_equal(table(tmp_path / "geffect", name), before[name])
    measure(place, f"{LAST} save_dir={tmp_path} sweep=[ga,wga:5] sweep_norms=true")
    lines, steps = (table(tmp_path / "geffect", name) for name in ("sweep", "steps"))
    with_norms = lines[lines["objective_norm"].notna()]
    assert set(zip(with_norms["method"], with_norms["hyper_param"].fillna(0), strict=True)) == {("ga", 0), ("wga", 5)}
    norms = dict(zip(steps["risk"], steps["risk_norm"], strict=True))
    cosines = with_norms["geffect"] / with_norms["objective_norm"] / with_norms["risk"].map(norms)
    assert with_norms["cosine"].tolist() == pytest.approx(cosines.tolist())


def test_what_a_gradient_rule_would_do(place: Path, everything: Path, tmp_path: Path) -> None:
    """Asked of a run without one; the prediction is then of the rule's step."""
    measure(place, f"model_path_cur={RUN} save_dir={tmp_path} instances=false rule=pcgrad")
    ruled, plain = (table(folder, "steps") for folder in (tmp_path / "geffect", place / RUN / "geffect"))
    assert (ruled["geffect"] - plain["geffect"]).abs().max() < 1e-5 * plain["geffect"].abs().max()
    assert (ruled["rule_geffect"] - ruled["geffect"]).abs().max() > 0
    foretold = table(tmp_path / "geffect", "prediction").set_index(["step", "risk"])["minus_lr_geffect"]
    rates = {line["step"]: line["learning_rate"] for line in map(json.loads, (place / RUN / "logs/train.jsonl").open())}
    of_steps = ruled.set_index(["step", "risk"])["rule_geffect"]
    assert foretold[5, "retain"] == pytest.approx(-rates[6] * of_steps[5, "retain"])


def test_two_processes_measure_the_same(place: Path, tmp_path: Path, everything: Path) -> None:
    words = f"{LAST} save_dir={tmp_path} tokens=true positions=true"
    run_in(place, f"torchrun --standalone --nproc_per_node=2 compute_geffect.py {words}")
    for name in ("steps", "layers", "instances", "positions", "tokens"):
        one, two = table(everything, name), table(tmp_path / "geffect", name)
        last = one.columns[-1] if name != "steps" else "geffect"
        assert one.select_dtypes(exclude="float").equals(two.select_dtypes(exclude="float"))
        assert ((one[last] - two[last]).abs().max()) < 1e-5 * one[last].abs().max(), name


def test_what_a_user_gets_wrong(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    for name, value in {"HYDRA_FULL_ERROR": "1", "CUDA_VISIBLE_DEVICES": "0"}.items():
        monkeypatch.setenv(name, value)  # what cli sets does not outlive the test
    cases = {
        "model_path_cur=icml": ["icml", "without a checkpoint"],
        "model_family=tiny method=ga model_path_cur=data/weight/ft_epoch40_lr0.001_tiny_full_wd0.0": ["step=N"],
        "model_family=tiny": ["method is missing", "flat, ga, gd, idk"],
        "model_family=tiny method=ga": ["save_dir"],
        f"model_path_cur={RUN} sweep=[ga,foo:1]": ["foo", "flat, ga, gd, idk"],
        f"model_path_cur={RUN} sweep=[wga:x]": ["wga:x", "METHOD:HYPER"],
        f"model_path_cur={RUN} method=ga": ["other settings", "method.name=npo there, ga here"],
        f"model_path_cur={RUN} dtype=float16": ["float16", "float64"],
        f"model_path_cur={RUN} tokens=3": ["tokens=3", "true or false"],
        f"model_path_cur={RUN} dtype=float64 weights=bfloat16 save_dir={tmp_path}": ["weights=bfloat16"],
        f"model_path_cur={RUN} instances=false positions=true save_dir={tmp_path}": ["positions=true"],
        f"model_path_cur={RUN} retain_holdout=41 save_dir={tmp_path}": ["retain_holdout=41", "held out 40"],
        f"model_path_cur={RUN} retain=none rule=gru save_dir={tmp_path}": ["rule=gru", "retain=none", "gd|"],
        f"model_path_cur={RUN} lr=1": ["unknown key 'lr'", "model_path_cur"],
    }
    for line, words in cases.items():
        monkeypatch.setattr(sys, "argv", ["compute_geffect.py", *line.split()])
        with pytest.raises(SystemExit) as stopped:
            cli(compute_geffect.run, GEffects)
        out, err = capsys.readouterr()
        assert (stopped.value.code, out) == (2, ""), line
        assert err.count("\n") == 1, err
        assert all(word in err for word in words), err


# ---- while unlearning ----


def test_measured_while_unlearning(place: Path, tmp_path: Path) -> None:
    """The totals of the saved checkpoints, and a training that is the same bit for bit."""
    how = "method=npo retain=kl geffect.every=5"
    unlearn_split(place, f"model_family=tiny split=forget05 {how} save_dir={tmp_path}/run", figures=True)
    for name in ("checkpoint-5", "checkpoint-6"):
        one, other = (load_file(folder / name / "model.safetensors") for folder in (place / RUN, tmp_path / "run"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    expected, found = totals(place / RUN / "geffect"), totals(tmp_path / "run/geffect")
    assert found.index.equals(expected.index)
    assert (found / expected - 1).abs().max() < 1e-5
    prediction = table(tmp_path / "run/geffect", "prediction")
    assert [tuple(pair) for pair in prediction[["step", "next_step"]].drop_duplicates().to_numpy()] == [(0, 1), (5, 6)]
    assert (tmp_path / "run/geffect/figures/prediction.pdf").exists()
    with pytest.raises(ValueError, match="measured while unlearning"):
        measure(place, f"model_path_cur={tmp_path}/run")


def test_killed_while_measuring_the_run_goes_on(place: Path, tmp_path: Path) -> None:
    words = "method=npo model_family=tiny split=forget05 geffect.every=2 save_steps=2 num_epochs=4"
    unlearn_split(place, f"{words} save_dir={tmp_path}/whole")
    moment = f"unlearn.geffect.meter.Meter.measure 3 after {shlex.quote('kill -KILL $PID')}"
    command = f"{ROOT}/forget.py {words} save_dir={tmp_path}/run"
    assert run_in(place, f"python {ROOT}/tests/at.py {moment} {command}", check=False).returncode == -9
    unlearn_split(place, f"{words} save_dir={tmp_path}/run")
    for name in ("steps", "layers", "instances", "updates", "prediction"):
        whole, run = (tmp_path / folder / f"geffect/{name}.csv" for folder in ("whole", "run"))
        assert whole.read_bytes() == run.read_bytes(), name


@pytest.mark.slow
def test_measured_in_two_training_processes(place: Path, tmp_path: Path) -> None:
    """DistributedDataParallel does not take the measured gradients for its own, and both processes' rows are in."""
    words = f"model_family=tiny split=forget05 num_epochs=3 save_steps=3 batch_size=2 'save_dir={tmp_path}/${{geffect.every}}'"
    torchrun = "torchrun --standalone --nproc_per_node=2"
    run_in(place, f"{torchrun} forget.py -m method=npo retain=kl geffect.every=0,2 {words}")
    one, other = (load_file(tmp_path / f"{every}/checkpoint-3/model.safetensors") for every in (0, 2))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert totals(tmp_path / "2/geffect")[0].to_numpy() == pytest.approx(
        totals(place / RUN / "geffect")[0].to_numpy(), rel=1e-4
    )


# ---- the library ----


@pytest.mark.filterwarnings("ignore:'pin_memory'")  # of a Trainer on a CPU
def test_the_library_pages_examples_run_in_an_empty_folder(
    young: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.DOTALL)
    assert len(examples) == 5
    for number, example in enumerate(examples):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "model").symlink_to(young)
        (folder / "example.py").write_text(example)
        monkeypatch.chdir(folder)
        runpy.run_path("example.py", run_name="__main__")
        assert ("unlearn", "geffect", "unlearn", "ps_exact", "forget_ps_exact")[number] in capsys.readouterr().out


Pair = tuple[str, str]
FORGET: list[Pair] = [("Where was Ada born? ", "In Riga."), ("And Ben? ", "In Oslo, in 1954.")]
KEEP: list[Pair] = [("What is the capital of France? ", "Paris.")]
TERM = Loss(ga, retain=mean_nll)


@pytest.fixture(scope="module")
def model(young: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(young)


@pytest.fixture(scope="module")
def tokenizer(young: Path) -> Any:
    return AutoTokenizer.from_pretrained(young)


def test_rows_as_texts_and_as_tokens(model: Any, tokenizer: Any) -> None:
    """The same numbers; a first label is none, for nothing stands before it (labels = input_ids, as for a `Trainer`)."""
    texts = geffect(model, tokenizer, FORGET, KEEP, TERM, beside=KEEP)
    forget_rows, keep = (tokenize_pairs(pairs, tokenizer) for pairs in (FORGET, KEEP))
    lists: Any = [{key: value.tolist() for key, value in row.items()} for row in forget_rows]
    tokens = geffect(model, tokenizer, lists, keep, TERM, beside=keep)
    whole = [row | {"labels": row["input_ids"]} for row in forget_rows]
    masked = [row | {"labels": torch.cat([torch.tensor([-100]), row["input_ids"][1:]])} for row in forget_rows]
    with_first, without = (geffect(model, tokenizer, rows, keep, ga) for rows in (whole, masked))
    for name, found in texts.items():
        pd.testing.assert_frame_equal(tokens[name], found)
        pd.testing.assert_frame_equal(with_first[name], without[name])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"forget": []}, "^forget: no rows"),
        ({"retain": []}, "^retain: no rows"),
        ({"retain": [*KEEP, {"input_ids": [5, 6], "labels": [-100, 6]}]}, "give them all as one of the two"),
        ({"forget": [{"input_ids": [5, 6], "labels": [-100, 6]}, *KEEP]}, "give them all as one of the two"),
        ({"objective": TERM}, "a retain term needs rows beside those to forget"),
        ({"beside": KEEP}, "rows beside them a retain term"),
        ({"wanted": Wanted(positions=True, instances=False)}, "^positions: only with instances"),
    ],
)
def test_what_the_library_refuses(model: Any, tokenizer: Any, changes: dict[str, Any], said: str) -> None:
    right: dict[str, Any] = {"forget": FORGET, "retain": KEEP, "objective": ga}
    meter_of(model, tokenizer, **right)
    with pytest.raises(ValueError, match=said):
        meter_of(model, tokenizer, **right | changes)


def test_a_model_without_a_trained_parameter_is_refused(young: Path, tokenizer: Any) -> None:
    frozen = AutoModelForCausalLM.from_pretrained(young).requires_grad_(False)
    with pytest.raises(ValueError, match="^LlamaForCausalLM: no parameter of it requires a gradient"):
        geffect(frozen, tokenizer, FORGET, KEEP, ga)


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_a_fresh_training_leaves_none_of_an_earlier_ones_tables(young: Path, tokenizer: Any, tmp_path: Path) -> None:
    """In a folder that was used before, and beside files that are no tables of ours."""

    def train(folder: Path, steps: int, wanted: Wanted) -> None:
        model = AutoModelForCausalLM.from_pretrained(young)
        ids = tokenizer("Where was Ada born? In Riga.")["input_ids"]
        meter = meter_of(model, tokenizer, FORGET, KEEP, ga, wanted=wanted)
        Trainer(
            model=model,
            args=TrainingArguments(str(tmp_path / "out"), max_steps=steps, report_to=[], save_strategy="no"),
            train_dataset=Dataset.from_dict({"input_ids": [ids] * 8, "labels": [ids] * 8}),
            callbacks=[GEffectCallback(meter, every=2, folder=folder)],
        ).train()

    def tables(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    used, new = tmp_path / "used", tmp_path / "new"
    train(used, 4, Wanted(tokens=True))
    assert {*table(used, "steps")["step"]} == {*table(used, "tokens")["step"]} == {0, 2, 4}
    (used / "notes.csv").write_text("step,note\n4,mine\n")
    for folder in (used, new):
        train(folder, 2, Wanted(instances=False))
    assert tables(used) == tables(new) | {"notes.csv": b"step,note\n4,mine\n"}
    assert {*table(new, "steps")["step"]} == {0, 2}
