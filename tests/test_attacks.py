"""Each attack's arithmetic against its definition by brute force, and numbers by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import nan, prod
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from unlearn.attacks import asking, quantization, relearning, sampling
from unlearn.attacks.quantization import NF4, int8, linear_layers, nf4, quantize
from unlearn.passes.decoding import Sampling

TINY: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
}


# ---- sampling ----


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_leak_at_k_is_the_share_of_subsets_that_leak(k: int) -> None:
    n, rows = 6, [[0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]
    shares = [np.mean([any(subset) for subset in combinations(row, k)]) for row in rows]
    assert sampling.leak_at_k(n, [sum(row) for row in rows], k) == pytest.approx(np.mean(shares), abs=1e-15)
    of_binary = [sampling.expected_best(row, k) for row in rows]
    assert np.mean(of_binary) == pytest.approx(np.mean(shares), abs=1e-15)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_expected_best_is_the_mean_over_subsets(k: int) -> None:
    scores = np.random.default_rng(0).random(7).round(1)  # with ties
    best = [max(subset) for subset in combinations(scores, k)]
    assert sampling.expected_best(scores, k) == pytest.approx(np.mean(best), rel=1e-14)


def test_leak_at_k_of_many_answers() -> None:
    """By the product form of the ratio, where the binomials themselves leave float."""
    n, c, k = 2000, 3, 700
    assert sampling.leak_at_k(n, [c], k) == pytest.approx(1 - prod((n - k - i) / (n - i) for i in range(c)), rel=1e-12)


@pytest.mark.parametrize(("leaks", "n", "confidence"), [(0, 20, 0.95), (3, 20, 0.95), (19, 20, 0.9), (7, 400, 0.99)])
def test_the_upper_bound_is_where_so_few_leaks_are_unlikely(leaks: int, n: int, confidence: float) -> None:
    p = sampling.upper_bound(leaks, n, confidence)
    assert binom.cdf(leaks, n, p) == pytest.approx(1 - confidence, rel=1e-9)


def test_the_upper_bound_by_hand() -> None:
    assert sampling.upper_bound(0, 20) == pytest.approx(1 - 0.05 ** (1 / 20), rel=1e-12)
    assert sampling.upper_bound(20, 20) == 1


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: sampling.leak_at_k(4, [1], 5), "k=5: needs to be from 1 to the 4 answers"),
        (lambda: sampling.leak_at_k(4, [5], 2), "leaks=5: of 4 answers 0 to 4 leak"),
        (lambda: sampling.expected_best([1.0], 0), "k=0: needs to be from 1 to the 1 answers"),
        (lambda: sampling.upper_bound(3, 2), "leaks=3: of 2 answers"),
        (lambda: sampling.upper_bound(1, 2, 1.0), "confidence=1.0"),
        (lambda: quantize(nn.Linear(2, 2), 3), "bits=3: is one of 8, 4"),  # type: ignore[arg-type]
        (lambda: asking.Template("t", "Answer:"), "template t: 'Answer:' needs {question}"),
    ],
)
def test_what_can_be_wrong(call: Callable[[], object], line: str) -> None:
    with pytest.raises(ValueError, match=line.replace("{", r"\{")):
        call()


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (None, 0.6), (4, 1.0), (4, 0.8), (None, 1e-9)])
def test_tokens_are_drawn_from_the_fewest_that_have_the_share(top_k: int | None, top_p: float) -> None:
    """How often each of 7 tokens is drawn by evenly spaced numbers, beside the distribution cut by hand."""
    logits = torch.randn(7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    n, temperature = 4000, 0.7
    numbers = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    drawn = Sampling(numbers, temperature, top_k, top_p)(logits.expand(n, 7), range(n), 0)
    p = (logits / temperature).softmax(-1)
    order = sorted(range(7), key=lambda i: -p[i])[: top_k or 7]
    p = p / sum(p[i] for i in order)
    kept = next(order[: m + 1] for m in range(len(order)) if sum(p[i] for i in order[: m + 1]) >= top_p - 1e-12)
    wanted = [float(p[i] / sum(p[j] for j in kept)) if i in kept else 0.0 for i in range(7)]
    assert (torch.bincount(drawn, minlength=7) / n).tolist() == pytest.approx(wanted, abs=1.5 / n)


# ---- quantisation ----


def slow_nf4(weight: torch.Tensor, block: int = 64) -> torch.Tensor:
    """Number by number: the level nearest to w / absmax, the lower of two that are equally near."""
    flat = weight.flatten().tolist()
    found: list[float] = []
    for start in range(0, len(flat), block):
        numbers = flat[start : start + block]
        absmax = max(map(abs, numbers))
        found += [absmax * min(NF4, key=lambda level: abs(w / absmax - level)) if absmax else 0.0 for w in numbers]
    return torch.tensor(found).view_as(weight)


@pytest.mark.parametrize("shape", [(3, 64), (5, 37), (2, 3, 50), (7,)])
def test_nf4_by_its_table(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight.flatten()[: min(64, weight.numel() // 2)] = 0  # a block without a size
    torch.testing.assert_close(nf4(weight), slow_nf4(weight), rtol=1e-6, atol=0)
    assert torch.equal(nf4(nf4(weight)), nf4(weight))
    assert len(set((nf4(weight.flatten()[:64]) / weight.flatten()[:64].abs().max().clamp(min=1e-9)).tolist())) <= 16


def test_the_levels_are_the_normal_quantiles() -> None:
    """As QLoRA's text makes them: 8 + 1 quantiles above 0 and 7 + 1 below, ends at 1/2 (1/30 + 1/32), scaled to [-1, 1]."""
    offset = 1 - (1 / 32 + 1 / 30) / 2
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, [0], below]))
    np.testing.assert_allclose(levels / levels.max(), NF4, atol=2e-3)  # the published ones were rounded on their way
    assert sorted(NF4) == list(NF4)
    assert len(NF4) == 16


def test_int8_by_its_definition() -> None:
    weight = torch.randn(6, 33, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    found = int8(weight)
    for row, of in zip(weight, found, strict=True):
        scale = row.abs().max().item() / 127
        slow = [round(w / scale) * scale if scale else 0.0 for w in row.tolist()]
        torch.testing.assert_close(of, torch.tensor(slow), rtol=1e-5, atol=1e-7)
    assert (found - weight).abs().max() <= weight.abs().amax() / 254 * (1 + 1e-5)


def test_precision_stays() -> None:
    weight = torch.randn(4, 64, dtype=torch.bfloat16)
    assert nf4(weight).dtype == int8(weight).dtype == torch.bfloat16
    assert nf4(weight.double()).dtype == torch.float64


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_linear_weights_alone_are_quantised(bits: int, tied: bool) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY, tie_word_embeddings=tied))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    quantize(model, bits)
    linear = {f"{name}.weight" for name in linear_layers(model)}
    assert linear == {name for name in before if name.endswith("_proj.weight")}
    for name, parameter in model.named_parameters():
        wanted = before[name] if name not in linear else (slow_nf4 if bits == 4 else int8)(before[name])
        torch.testing.assert_close(parameter, nn.Parameter(wanted), rtol=1e-6, atol=0)
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)


def test_what_is_kept_across_is_quantised_along_its_outputs() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=50))
    before = model.transformer.h[0].mlp.c_fc.weight.clone()  # (in, out)
    quantize(model, 8)
    torch.testing.assert_close(model.transformer.h[0].mlp.c_fc.weight.data, int8(before.T).T)


@pytest.mark.parametrize(
    ("before", "after", "known", "q"),
    [
        (0.2, 0.4, True, 0.5),  # half of what is known now was known before
        (0.4, 0.2, True, 1),
        (0.0, 0.3, True, 0),
        (0.3, 0.0, True, 1),
        (0.0, 0.0, True, 1),
        (0.8, 0.6, False, 0.75),
        (0.6, 0.8, False, 1),
        (0.0, 0.5, False, nan),
        (nan, 0.5, True, nan),
    ],
)
def test_q_by_hand(before: float, after: float, known: bool, q: float) -> None:
    assert quantization.resistance_to_quantization(before, after, known) == pytest.approx(q, nan_ok=True)


# ---- relearning ----


@pytest.mark.parametrize(
    ("numbers", "r"),
    [
        ((0.1, 0.5, 0.2, 0.4), 0.5),  # gained 0.4, the retain model 0.2
        ((0.1, 0.3, 0.2, 0.6), 1),  # less than the retain model
        ((0.1, 0.3, 0.4, 0.3), -0.5),  # the retain model has lost
        ((0.1, 0.3, 0.2, 0.2), 0),
        ((0.3, 0.3, 0.2, 0.4), nan),  # nothing gained
        ((0.3, 0.2, 0.2, 0.4), nan),
        ((nan, 0.2, 0.2, 0.4), nan),
        ((0.1, 0.2, nan, 0.4), nan),
    ],
)
def test_r_by_hand(numbers: tuple[float, float, float, float], r: float) -> None:
    assert relearning.resistance_to_relearning(*numbers) == pytest.approx(r, nan_ok=True)


def test_the_harmonic_mean() -> None:
    assert relearning.harmonic_mean(0.5, 1) == pytest.approx(2 / 3)
    assert relearning.harmonic_mean(0, 0.7) == relearning.harmonic_mean(0, 0) == 0
    assert np.isnan([relearning.harmonic_mean(*of) for of in ((nan, 1), (1, nan), (-0.1, 0.5))]).all()


@pytest.mark.parametrize(
    ("steps", "every", "at"), [(8, None, [2, 4, 6, 8]), (2, None, [1, 2]), (1, None, [1]), (7, 3, [3, 6, 7]), (6, 3, [3, 6])]
)
def test_the_steps_that_are_measured(steps: int, every: int | None, at: list[int]) -> None:
    assert relearning.measured_steps(steps, every) == at


# ---- asking otherwise ----


def test_a_template_asks() -> None:
    row = {"question": "Who?", "answer": "The old {woman} of the sea and hills", "other": 1}
    asked = asking.Template("t", "Please: {question}", "Well, {first_words} ").ask(row)
    assert asked == {"question": "Please: Who?", "answer_start": "Well, The old ", "answer": "{woman} of the sea and hills"} | {
        "other": 1
    }
    assert asking.Template("t", start="{first_words} ").ask({"question": "Who?", "answer": "Bremen"}) is None
    assert asking.Template("t").ask(row) == row | {"answer_start": ""}


def test_paraphrases_are_of_all_columns() -> None:
    row = {"question": "a", "answer": "b", "one": "c", "many": ["d", "e"], "none": None}
    assert [of["question"] for of in asking.rephrased(row, ["one", "many", "none", "lacking"])] == ["c", "d", "e"]


def test_the_worst() -> None:
    assert asking.worst([0.1, nan, 0.7]) == 0.7
    assert asking.worst([0.1, nan, 0.7], lowest=True) == 0.1
    assert np.isnan(asking.worst([nan]))
