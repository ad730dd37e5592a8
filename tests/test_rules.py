"""Gradient rules and dual variables: published values, identities, a step cut in any way, and runs that were killed."""

from __future__ import annotations

import json
import math
import shlex
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, SHARED, run_in
from hydra.utils import instantiate
from safetensors.torch import load_file
from test_objectives import gold_model, gold_rows, needs_gold
from torch import Tensor, nn

from app.building import dual_of, rule_of
from app.checks import check_rule
from app.compose import given
from app.measuring import at_step, logged_duals
from app.runs import suffix
from app.settings import Method
from unlearn.models.vectors import inner
from unlearn.objectives.dual import Dual
from unlearn.objectives.functions import ga, mean_nll
from unlearn.objectives.loss import Loss
from unlearn.objectives.rows import forget_batch, parts_of
from unlearn.objectives.tokens import Counts, Tokens, token_outputs
from unlearn.training.ascent import Ascent
from unlearn.training.gradients import TwoGradients
from unlearn.training.rules import Rule, blur, gru, pcgrad, sago, total

GOLD = SHARED / "gold" / "objectives2" / "expected.json"
EXPECTED: dict[str, Any] = json.loads(GOLD.read_text()) if GOLD.exists() else {"rules": {}, "gradients": {}}
RULES: dict[str, Any] = {
    "sum": total,
    "pcgrad": pcgrad,
    "pcgrad by tensor": partial(pcgrad, by_tensor=True),
    "gru | 0.8, second step, f alone": gru,
    "blur": blur,
    "sago": sago,
    "sago prefer_retain": partial(sago, prefer_retain=True),
}
CUTS = ["npo_gd+rule:gru", "npo_gd+rule:pcgrad+rule.by_tensor:true", "rmu_2_gd+rule:sago", "npo_gd+log_conflict:true"]
CUT_BY = {"accumulated": CUTS, "processes": [CUTS[0], CUTS[2]], "shards": [CUTS[0], CUTS[1]]}
COLUMNS = {"forget_retain", "forget_retain_cosine", "forget_norm", "retain_norm", "rule_removed", "rule_e_r"}
Vectors = dict[str, Tensor]


def product(a: Vectors, b: Vectors) -> float:
    return sum(inner(a, b).values())


# ---- published values ----


def gold_gradient(rows: str, sign: int, part: slice = slice(None)) -> Vectors:
    """Of the rows' token-mean cross-entropy, or minus that."""
    model = gold_model("theta")
    loss = sign * token_outputs(model, {key: value[part] for key, value in gold_rows(rows).items()}).nll.mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.fixture(scope="module")
def gold() -> dict[str, Vectors]:
    """g_f, g_r, and the moving average at the second of two steps, by `TwoGradients` itself."""
    forget, retain = gold_gradient("forget", -1), gold_gradient("retain", 1)
    two = TwoGradients(Rule(gru, 0.8), dict(gold_model("theta").named_parameters()))
    for part in (slice(0, 2), slice(2, 4)):
        average = two._averaged(gold_gradient("retain", 1, part))
    return {"forget": forget, "retain": retain, "average": average}


@needs_gold
def test_published_gradients(gold: dict[str, Vectors]) -> None:
    f, r, m = gold["forget"], gold["retain"], gold["average"]
    found = [math.sqrt(product(f, f)), math.sqrt(product(r, r)), product(f, r), math.sqrt(product(m, m)), product(f, m)]
    assert found == pytest.approx(list(EXPECTED["gradients"].values()), rel=1e-9)


@needs_gold
@pytest.mark.parametrize("name", RULES)
def test_published_steps(gold: dict[str, Vectors], name: str) -> None:
    f, r, m = gold["forget"], gold["retain"], gold["average"]
    step = dict(RULES[name](f, m if name.startswith("gru") else r))
    found = [math.sqrt(product(step, step)), product(step, f), product(step, r)]
    assert found == pytest.approx(list(EXPECTED["rules"][name].values()), rel=1e-9)


@needs_gold
def test_the_published_rules_are_all_here() -> None:
    assert set(RULES) == set(EXPECTED["rules"])


# ---- identities ----


def trees(cosine: float) -> tuple[Vectors, Vectors]:
    """Two random gradients of a few tensors, in float64, with about that cosine."""
    draw = torch.Generator().manual_seed(3)
    shapes = {"a": (4, 5), "b": (7,), "c": (1,)}
    f, other = ({name: torch.randn(shape, generator=draw).double() for name, shape in shapes.items()} for _ in range(2))
    return f, {name: cosine * f[name] + 0.1 * other[name] for name in shapes}


@pytest.mark.parametrize("rule", [pcgrad, partial(pcgrad, by_tensor=True)])
def test_gradients_that_agree_are_added(rule: Any) -> None:
    f, r = trees(1.0)
    assert all(value > 0 for value in inner(f, r).values())
    for (name, step), (_, plain) in zip(rule(f, r), total(f, r), strict=True):
        assert torch.equal(step, plain), name
    assert all(torch.equal(step, f[name]) for name, step in gru(f, r))


@pytest.mark.parametrize("name", RULES)
def test_what_each_does_where_they_disagree(name: str) -> None:
    f, r = trees(-1.0)
    step = dict(RULES[name](f, r))
    bound = 1e-12 * math.sqrt(product(step, step) * product(r, r))
    e_r = product(step, r)
    if name.startswith("gru"):
        assert abs(e_r) <= bound
        along = product(f, r) / product(r, r)
        assert product(step, f) == pytest.approx(product(f, f) - along * product(f, r))
    if name.startswith("pcgrad"):
        assert e_r >= -bound
        if "tensor" in name:  # of each tensor, <step, g_r> is |g_r|^2
            assert inner(step, r) == pytest.approx(inner(r, r))
    if name == "blur":
        assert product(step, f) == pytest.approx(product(f, f))
    if name.startswith("sago"):
        for key, s in step.items():
            differ = f[key] * r[key] < 0
            assert torch.equal(s[differ], r[key][differ])
            rest = f[key] + r[key] if "prefer" in name else f[key]
            assert torch.equal(s[~differ], rest[~differ])


def test_a_gradient_of_nothing_takes_nothing_off() -> None:
    f, r = trees(1.0)
    none = {name: torch.zeros_like(x) for name, x in f.items()}
    for rule in (pcgrad, blur, sago):
        assert all(torch.equal(step, f[name]) for name, step in rule(f, none)), rule
    assert all(torch.equal(step, r[name]) for name, step in blur(none, r))


def test_parameters_that_only_one_gradient_has() -> None:
    """As where an objective looks at a layer: they get zeros of the other, and those that neither has stay without."""
    parameters = {name: nn.Parameter(torch.ones(2)) for name in ("both", "mine", "theirs", "none")}
    two = TwoGradients(Rule(pcgrad), parameters)
    for _ in range(2):  # micro-batches add up
        with two.into("forget"):
            (parameters["both"].sum() + 2 * parameters["mine"].sum()).backward()
        with two.into("retain"):
            (-parameters["both"].sum() + parameters["theirs"].sum()).backward()
    assert all(p.grad is None for p in parameters.values())
    numbers = two.step()
    f, r = {"both": 2.0, "mine": 4.0, "theirs": 0.0}, {"both": -2.0, "mine": 0.0, "theirs": 2.0}
    along = sum(f[name] * r[name] for name in f) / sum(x * x for x in r.values())
    for name in f:
        grad = parameters[name].grad
        assert grad is not None
        assert grad.tolist() == pytest.approx([f[name] - along * r[name] + r[name]] * 2)
    assert parameters["none"].grad is None
    norms = math.sqrt(2 * sum(x * x for x in f.values())), math.sqrt(2 * sum(x * x for x in r.values()))
    assert set(numbers) == COLUMNS
    assert (numbers["forget_norm"], numbers["retain_norm"], numbers["forget_retain"]) == pytest.approx((*norms, -8))
    assert numbers["forget_retain_cosine"] == pytest.approx(-8 / math.prod(norms))
    assert numbers["rule_removed"] == pytest.approx(-along * norms[1])
    assert numbers["rule_e_r"] == pytest.approx(norms[1] ** 2)


def row(first: int, n: int) -> dict[str, Any]:
    ids = torch.arange(first, first + n)
    return {"input_ids": ids, "labels": torch.cat([torch.tensor([-100]), ids[1:]])}


def test_a_batch_in_its_two_parts() -> None:
    """Second answers go with the rows to forget, and so does what the reference says of them."""
    forget = [
        row(i, 3 + i) | {"second": row(20 + i, 4) | {"ref_nll": torch.ones(3)}, "ref_nll": torch.ones(2 + i)} for i in (0, 1)
    ]
    retain = [row(10, 5), row(11, 4)]
    batch = forget_batch(forget, retain, 0) | {"forget_counts": (5, 2), "retain_counts": (7, 2)}
    batch["rows"] = {"forget": [1, 2], "retain": [3, 4]}
    mine, theirs = parts_of(batch)
    assert mine["input_ids"][:, 0].tolist() == [0, 1, 20, 21]
    assert theirs["input_ids"][:, 0].tolist() == [10, 11]
    assert (mine["n_forget"], mine["n_second"], theirs["n_forget"], theirs["n_second"]) == (2, 2, 0, 0)
    assert {"ref_nll", "second_ref_nll"} <= mine.keys()
    assert not {"ref_nll", "second_ref_nll"} & theirs.keys()
    assert (mine["rows"], theirs["rows"]) == ({"forget": [1, 2], "retain": []}, {"forget": [], "retain": [3, 4]})


# ---- settings ----


def test_sum_is_todays_path() -> None:
    """No rule at all: the loss's gradient is formed at once, by the same calls; and the folder is named as before."""
    settings = given("forget", ["model_family=tiny", "retain=gd"])
    assert settings.rule.name == "sum"
    assert rule_of(settings) is None
    assert suffix(settings) == ""
    apart = rule_of(given("forget", ["model_family=tiny", "retain=gd", "log_conflict=true"]))
    assert apart is not None
    assert (apart.combine.func, apart.average) == (total, None)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "name", "function", "hyper", "average"),
    [
        ("rule=pcgrad", "_rule=pcgrad", pcgrad, {"by_tensor": False}, None),
        ("rule=pcgrad rule.by_tensor=true", "_rule=pcgrad_rule.by_tensor=True", pcgrad, {"by_tensor": True}, None),
        ("rule=gru", "_rule=gru", gru, {}, 0.8),
        ("rule=gru rule.average=0.5", "_rule=gru_rule.average=0.5", gru, {}, 0.5),
        ("rule=blur", "_rule=blur", blur, {}, None),
        ("rule=sago rule.prefer_retain=true", "_rule=sago_rule.prefer_retain=True", sago, {"prefer_retain": True}, None),
    ],
)
def test_rules_by_their_names(words: str, name: str, function: Any, hyper: dict[str, Any], average: float | None) -> None:
    settings = given("forget", ["model_family=tiny", "retain=gd", *words.split()])
    assert suffix(settings) == name
    rule = rule_of(settings)
    assert rule is not None
    assert (rule.combine.func, rule.combine.keywords, rule.average) == (function, hyper, average)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("rule=gru", "^rule=gru: retain=none has no gradient beside that of method=npo; give retain=.*gd.*kl"),
        ("log_conflict=true", "^log_conflict=true: retain=none"),
        ("rule=other retain=gd", "there are|rule/other"),
        ("rule=gru retain=gd rule.average=2", "^rule.average=2: needs to be a number of at least 0 and at most 1"),
        ("rule=sago retain=gd rule.prefer_retain=3", "^rule.prefer_retain=3: needs to be true or false"),
    ],
)
def test_what_can_not_be(words: str, line: str) -> None:
    with pytest.raises(Exception, match=line):
        check_rule(given("forget", ["model_family=tiny", "method=npo", *words.split()]))


# ---- a step cut in any way ----


@pytest.fixture(scope="module")
def cuts(young: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of 5 steps of 8 rows: one process, accumulated, two processes, and two with shards and accumulated."""
    out = tmp_path_factory.mktemp("cuts")
    script, methods = ROOT / "tests" / "unlearn_five_steps.py", " ".join(CUTS)
    torchrun = "torchrun --nproc_per_node=2 --master_port=18775"
    run_in(ROOT, f"python {script} {young} {out}/whole 8 1 ddp {methods} npo_gd")
    run_in(ROOT, f"python {script} {young} {out}/accumulated 4 2 ddp {methods}")
    run_in(ROOT, f"{torchrun} {script} {young} {out}/processes 4 1 ddp {' '.join(CUT_BY['processes'])}")
    run_in(ROOT, f"{torchrun} {script} {young} {out}/shards 2 2 fsdp {' '.join(CUT_BY['shards'])}")
    return {name: out / name for name in ("whole", "accumulated", "processes", "shards")}


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "logs/train.jsonl").open()]


def differences(one: Path, two: Path, step: int = 5) -> torch.Tensor:
    """Of each weight."""
    a, b = (load_file(run / f"checkpoint-{step}/model.safetensors") for run in (one, two))
    return torch.cat([(a[name] - b[name]).abs().flatten() for name in a])


@pytest.mark.parametrize(("cut", "method"), [(cut, method) for cut, methods in CUT_BY.items() for method in methods])
def test_a_rules_step_is_the_same_however_it_is_cut(cuts: dict[str, Path], method: str, cut: str) -> None:
    """Weights to 1e-5 in float32 after 5 steps, and the log to 1e-3.

    But where a gradient is 0 to rounding sago's choice by its sign may differ, and Adam then moves that weight by the rate.
    """
    apart = differences(cuts["whole"] / method, cuts[cut] / method)
    assert (apart > 1e-5).float().mean() <= (1e-4 if "sago" in method else 0)
    for one, other in zip(lines_of(cuts["whole"] / method), lines_of(cuts[cut] / method), strict=True):
        for name in COLUMNS - {"forget_retain_cosine"}:
            scale = one["forget_norm"] * one["retain_norm"] if name in ("forget_retain", "rule_e_r") else one["forget_norm"]
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-3 * scale), name


def test_two_gradients_added_are_the_losss(cuts: dict[str, Path]) -> None:
    assert differences(cuts["whole"] / "npo_gd", cuts["whole"] / "npo_gd+log_conflict:true").max().item() < 1e-5
    for line, plain in zip(*(lines_of(cuts["whole"] / name) for name in ("npo_gd+log_conflict:true", "npo_gd")), strict=True):
        assert line["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
        assert not COLUMNS & plain.keys()


@pytest.mark.parametrize("method", CUTS)
def test_every_step_has_its_conflict_in_the_log(cuts: dict[str, Path], method: str) -> None:
    """The norms and inner products fit together, and e_r of the step is not below 0 where a rule sees to it."""
    for line in lines_of(cuts["whole"] / method):
        assert line.keys() >= COLUMNS
        f, r, both = line["forget_norm"], line["retain_norm"], line["forget_retain"]
        if r > 0:
            assert line["forget_retain_cosine"] == pytest.approx(both / (f * r))
        if "log_conflict" in method:
            assert line["rule_removed"] == 0
            assert line["grad_norm"] == pytest.approx(math.sqrt(f * f + r * r + 2 * both), rel=1e-4)  # summed in float32
            assert line["rule_e_r"] == pytest.approx(both + r * r, rel=1e-5, abs=1e-6 * f * r)
        if "gru" in method or "pcgrad" in method:
            assert line["rule_e_r"] >= -1e-6 * line["grad_norm"] * max(r, 1.0)
            assert line["rule_removed"] >= 0


# ---- killed and resumed ----


def command(model: Path, save_dir: str, more: str) -> str:
    own = "model_family=tiny split=forget05 dtype=float32 retain=gd save_steps=1 num_epochs=2 batch_size=2"
    return f"{ROOT}/tests/dual_run.py {own} model_path={model} save_dir={save_dir} {more}"


@pytest.mark.parametrize("more", ["method=npo rule=gru", "method=ga dual=true", "method=pdu"])
def test_killed_and_resumed_with_the_same_bits(young: Path, tmp_path: Path, more: str) -> None:
    """The moving average and the dual variable are part of what a killed run goes on from."""
    run_in(tmp_path, f"python {command(young, 'whole', more)}")
    then = shlex.quote("kill -KILL $PID")
    run_in(
        tmp_path, f"python {ROOT}/tests/at.py torch.optim.AdamW.step 4 before {then} {command(young, 'run', more)}", check=False
    )
    assert (tmp_path / "run/resume/checkpoint-3/rule_and_dual.pt").exists()
    assert "going on after step 3" in run_in(tmp_path, f"python {command(young, 'run', more)}").stderr
    ends = [(tmp_path / name / "checkpoint-5/model.safetensors").read_bytes() for name in ("whole", "run")]
    assert ends[0] == ends[1]
    timed = {"tokens_per_second", "peak_memory_gib"}
    logs = [[{k: v for k, v in line.items() if k not in timed} for line in lines_of(tmp_path / n)] for n in ("whole", "run")]
    assert logs[0] == logs[1]
    if "gru" not in more:
        start = 100 if "pdu" in more else 0.5
        duals = [line["dual"] for line in logs[0]]
        assert duals[:2] == [start, start]  # 2 of 5 steps are warm-up
        assert len(set(duals)) == 4
        assert logged_duals(tmp_path / "run") == dict(enumerate(duals, start=1))


# ---- dual variables ----


def loss_of(dual: Dual | None, weight: float = 1.0) -> Loss:
    return Loss(ga, retain=mean_nll, weight=weight, dual=dual)


def tokens_of(rows: int) -> Tokens:
    nll = torch.arange(1.0, 1 + 2 * rows, dtype=torch.float64, requires_grad=True)
    return Tokens(nll=nll, row=torch.arange(rows).repeat_interleave(2), n_rows=rows, logits=torch.zeros(2 * rows, 3))


def test_the_loss_with_a_dual_variable() -> None:
    """forget + lambda (L_retain - eps), in shares that add up; only training's are noted."""
    dual = Dual(3.0, 0.5, 2.0, 1)
    batch = {"n_forget": 1, "forget_counts": (2, 1), "retain_counts": (6, 3), "labels": torch.zeros(3, 2)}
    tokens = tokens_of(3)
    with dual.watching():
        parts = loss_of(dual).of_tokens(tokens, batch)
    loss_of(dual).of_tokens(tokens, batch)
    retain = mean_nll(tokens.split(1)[1], Counts(6, 3))
    assert parts["retain"].item() == pytest.approx(3 * (retain.item() - 0.5 * 2 / 3))
    assert dual.taken().item() == pytest.approx(retain.item())
    assert dual.noted == []


def test_its_ascent() -> None:
    dual = Dual(1.0, 0.5, 2.0, warmup=1)
    for step, retain, expected in ((1, 2.0, 1.0), (2, 1.0, 2.0), (3, 0.25, 1.5), (4, -9.0, 0.0), (5, 0.6, 0.2)):
        dual.ascend(retain, step)
        assert dual.value == pytest.approx(expected)
    dual.noted = [torch.tensor(0.5), torch.tensor(0.25)]
    state: Any = SimpleNamespace(global_step=6)
    Ascent(dual).on_step_end(state, state, state)
    assert dual.value == pytest.approx(0.2 + 2 * 0.25)


def test_a_dual_variable_from_its_yaml() -> None:
    given_pdu = given("forget", ["model_family=tiny", "method=pdu", "hyper_param=50"])
    assert dual_of(given_pdu.method, 41) == Dual(50, 0.3, 5, 20)
    assert (given_pdu.retain.name, given_pdu.retain.weight) == ("gd", 1)
    check_rule(given_pdu)
    found = {"name": "pdu", "objective": {}, "dual": {"start": 100, "eps": 0.3, "eta": 5, "warmup": 0.5}}
    method = Method.model_validate(found)
    assert dual_of(Method.model_validate({"name": "ga", "objective": {}})) is None
    settings = given("forget", ["model_family=tiny", "retain=gd"]).model_copy(update={"method": method})
    check_rule(settings)
    none = given("forget", ["model_family=tiny"]).retain
    with pytest.raises(ValueError, match="^retain=none: the dual variable of method=pdu is a term's weight; give retain="):
        check_rule(settings.model_copy(update={"retain": none}))
    twice = settings.retain.model_copy(update={"weight": 2})
    with pytest.raises(ValueError, match=r"^retain.weight=2: method=pdu has method.dual.start=100 in its place"):
        check_rule(settings.model_copy(update={"retain": twice}))
    with pytest.raises(ValueError, match="give a retain term"):
        Loss(ga, dual=Dual(1, 0, 1))
    assert callable(instantiate(given("forget", ["model_family=tiny"]).rule.combine))


def test_a_checkpoint_is_measured_with_its_steps_dual_variable() -> None:
    dual = Dual(100, 0.3, 5)
    meter: Any = SimpleNamespace(target=SimpleNamespace(loss=loss_of(dual)))
    for step, expected in ((0, 100), (2, 3.5), (1, 7.0)):
        at_step(meter, step, {1: 7.0, 2: 3.5})
        assert dual.value == expected
    with pytest.raises(ValueError, match="^step 3: the run's log has no dual variable of that step$"):
        at_step(meter, 3, {1: 7.0, 2: 3.5})
    at_step(meter, 3, {})  # of no such run: as it is
    assert dual.value == 7.0
