"""Linear CKA against its definition by Gram matrices, layers' outputs against the model's own, layers.csv of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from torch import Tensor

import evaluation_everything
from app import evaluating
from app.compose import given
from app.representation import write
from unlearn.models import checkpoints
from unlearn.objectives.rows import tokenize_pairs
from unlearn.objectives.tokens import label_positions
from unlearn.passes import Pass
from unlearn.reporting import representation_figure
from unlearn.scores.representation import hidden_states, layer_names, linear_cka, mean_cosine
from utils import device

device()
pytestmark = pytest.mark.on_cpu


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_gram_matrices(x: Tensor, y: Tensor) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), HSIC(K, L) = tr(K H L H) / (n - 1)^2 with the centring matrix H."""
    n = len(x)
    h = torch.eye(n, dtype=torch.float64) - 1 / n

    def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        return torch.trace(k @ h @ l @ h) / (n - 1) ** 2

    k, l = x @ x.T, y @ y.T  # noqa: E741
    return float(hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt())


@pytest.mark.parametrize(("n", "d", "e"), [(40, 5, 7), (40, 7, 7), (6, 20, 9), (12, 5, 30)])
def test_linear_cka_is_that_of_the_centred_gram_matrices(n: int, d: int, e: int) -> None:
    x = random(n, d) + 3  # off centre
    y = x @ random(d, e, seed=1) + 0.5 * random(n, e, seed=2)
    found = linear_cka(x, y)
    assert found == pytest.approx(by_gram_matrices(x, y), rel=1e-10)
    assert found == pytest.approx(linear_cka(y, x), rel=1e-12)
    assert 0 < found < 1


@pytest.mark.parametrize("n", [4, 50])
def test_a_rotation_a_scale_and_a_shift_are_no_change(n: int) -> None:
    x = random(n, 8)
    rotation = torch.linalg.qr(random(8, 8, seed=1)).Q
    assert linear_cka(x, 3 * x @ rotation + random(8, seed=2)) == pytest.approx(1, rel=1e-12)
    assert linear_cka(x, x * torch.arange(1, 9)) < 0.999  # which another linear map is
    assert np.isnan(linear_cka(x, torch.ones(n, 3)))


def test_the_cosine_is_the_mean_over_tokens() -> None:
    x, y = random(9, 4), random(9, 4, seed=1)
    slow = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(x, y, strict=True)]
    assert mean_cosine(x, y) == pytest.approx(np.mean(slow), rel=1e-12)
    assert mean_cosine(x, 2 * x) == pytest.approx(1)


# ---- of a model ----


class Place:
    """Three random models of one tokenizer, and the rows."""

    def __init__(self, folder: Path) -> None:
        self.data, self.small = folder / "few", folder / "small"
        self.data.mkdir()
        self.small.mkdir()
        sizes = {"retain90": 9, "forget10": 5, "forget10_perturbed": 5, "retain_perturbed": 4, "holdout10": 4}
        for name, n in sizes.items():
            lines = (ROOT / f"data/sample/{name}.json").read_text().splitlines(keepends=True)
            (self.data / f"{name}.json").write_text("".join(lines[:n]))
        self.rows = [json.loads(line) for line in (self.data / "forget10.json").open()]
        tiny = json.loads((ROOT / "config/tiny/config.json").read_text())
        small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
        (self.small / "config.json").write_text(json.dumps(tiny | small))
        texts = [row["question"] + row["answer"] for row in self.rows]
        self.models = {}
        for seed, name in enumerate(("original", "unlearned", "retain")):
            tokenizer, model = checkpoints.new_model(str(self.small), texts, seed, torch.device("cpu"))
            checkpoints.save_into(folder / name, model, tokenizer, "float32")
            self.models[name] = folder / name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


def loaded(path: Path) -> tuple[Any, Any]:
    return checkpoints.load(str(path), "", torch.device("cpu"))


def slow_outputs(model: Any, rows: list[dict[str, Tensor]]) -> Tensor:
    """Row by row, as the model itself gives them."""
    found = []
    for row in rows:
        with torch.no_grad():
            states = model(input_ids=row["input_ids"][None], output_hidden_states=True).hidden_states
        at = label_positions(row["labels"][None])
        found.append(torch.stack([state[0, at] for state in states], dim=1))
    return torch.cat(found)


def pairs_of(place: Place) -> list[tuple[str, str]]:
    return [(f"Question: {row['question']}\nAnswer: ", row["answer"]) for row in place.rows]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_layers_outputs_are_the_models_own(place: Place, batch_size: int) -> None:
    tokenizer, model = loaded(place.models["unlearned"])
    rows = tokenize_pairs(pairs_of(place), tokenizer)
    how = Pass(model, tokenizer.pad_token_id, tokenizer.eos_token_id, batch_size=batch_size)
    slow = slow_outputs(model, rows)
    found = hidden_states(how, rows)
    assert found.shape == (len(slow), 4, 32)
    torch.testing.assert_close(found, slow, rtol=1e-4, atol=1e-5)
    few = hidden_states(how, rows, most=7)
    n = len(slow)
    torch.testing.assert_close(few, slow[[i * n // 7 for i in range(7)]], rtol=1e-4, atol=1e-5)
    assert layer_names(4) == ["embed", "0", "1", "2"]


def represented(place: Place, folder: Path, *words: str) -> None:
    common = ["model_family=tiny", "split=forget10", f"hf_key={place.small}", f"data_path={place.data}", "dtype=float32"]
    common += [f"model_path={place.models['unlearned']}", f"original_path={place.models['original']}", "control=false"]
    evaluation_everything.run(given("eval_everything", [*common, f"save_dir={folder}", "representation=true", *words]))


def test_layers_of_a_checkpoint(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line against the outputs row by row; done once; nothing of it where it is not asked for."""
    represented(place, tmp_path / "a", f"retain_path={place.models['retain']}")
    table = pd.read_csv(tmp_path / "a/layers.csv", dtype={"layer": str})
    assert len(table) == 3 * 2 * 4  # pairs, sets, layers
    assert (tmp_path / "a/figures/layers.pdf").exists()
    outputs = {}
    for name, path in place.models.items():
        tokenizer, model = loaded(path)
        outputs[name] = slow_outputs(model, tokenize_pairs(pairs_of(place), tokenizer))
    for line in table[table["data"] == "forget"].itertuples():
        i = layer_names(4).index(line.layer)
        one, other = (outputs[name][:, i] for name in (line.model, line.beside))
        assert line.cka == pytest.approx(by_gram_matrices(one.double(), other.double()), rel=1e-4)
        assert line.cosine == pytest.approx(mean_cosine(one, other), rel=1e-3, abs=1e-5)
        assert line.tokens == len(one)
    monkeypatch.setattr(evaluating.Models, "at", None)
    before = (tmp_path / "a/layers.csv").read_bytes()
    represented(place, tmp_path / "a", f"retain_path={place.models['retain']}")
    assert (tmp_path / "a/layers.csv").read_bytes() == before
    monkeypatch.undo()
    represented(place, tmp_path / "b", "representation=false")
    assert not (tmp_path / "b/layers.csv").exists()
    represented(place, tmp_path / "b")
    alone = pd.read_csv(tmp_path / "b/layers.csv", dtype={"layer": str})
    assert set(zip(alone["model"], alone["beside"], strict=True)) == {("unlearned", "original")}


def test_a_runs_steps_stand_in_one_table(tmp_path: Path) -> None:
    for step, cka in ((4, 0.5), (12, 0.3), (4, 0.6)):
        target = evaluating.Target("", tmp_path / f"checkpoint-{step}", step, tmp_path, tmp_path)
        write(target, [{"step": step, "layer": "0", "cka": cka, "cosine": float("nan")}])
    table = pd.read_csv(tmp_path / "layers.csv")
    assert table[["step", "cka"]].to_numpy().tolist() == [[4, 0.6], [12, 0.3]]
    assert table["cosine"].isna().all()
    assert len(pd.read_csv(tmp_path / "checkpoint-4/layers.csv")) == 1


def test_the_figure_has_the_g_effects_beside(tmp_path: Path) -> None:
    layers = ["embed", *map(str, range(6))]
    cka = [0.99, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    lines = [
        {"model": "unlearned", "beside": "original", "data": data, "layer": layer, "cka": value, "cosine": value}
        for data in ("forget", "retain")
        for layer, value in zip(layers, cka, strict=True)
    ]
    pd.DataFrame(lines).to_csv(tmp_path / "layers.csv", index=False)
    (tmp_path / "geffect").mkdir()
    effects = [
        {"step": step, "risk": risk, "layer": layer, "module": module, "geffect": -i * step}
        for step in (1, 5)
        for risk in ("unlearn", "retain")
        for i, layer in enumerate([*layers, "norm"])
        for module in (f"{layer}.a", f"{layer}.b")
    ]
    pd.DataFrame(effects).to_csv(tmp_path / "geffect/layers.csv", index=False)
    table = pd.read_csv(tmp_path / "layers.csv", dtype={"layer": str})
    found = representation_figure.effects_at(tmp_path / "geffect", 5)
    assert found.loc["3", "unlearn"] == -4 * 5 * 2
    assert representation_figure.agreement(table, found) == pytest.approx(1)
    assert len(representation_figure.layers_figure(table, found).axes) == 3
    assert representation_figure.effects_at(tmp_path / "geffect", 7).empty
    assert representation_figure.draw(tmp_path, tmp_path / "geffect", 5) == [
        tmp_path / f"figures/layers.{kind}" for kind in ("pdf", "png")
    ]
    (tmp_path / "layers.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="layers.csv: not a table to draw from"):
        representation_figure.draw(tmp_path)
