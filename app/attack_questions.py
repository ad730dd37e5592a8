"""Attacks by questions: sampled answers, questions inside templates and in other words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from app.attack_tables import Result
from app.attack_work import Part, Work, of_forget, templates_of
from app.data import Rows

# ---- sampled answers ----


def sample(work: Work, path: str, part: Part) -> list[Result]:
    """leak@k and the expected best of k of n drawn answers to each forget question."""
    from unlearn.attacks import expected_best, leak_at_k, upper_bound
    from unlearn.scores.definitions import mean

    s = work.settings.sample
    rows = work.rows["forget"]
    drawn = [part(f"draw_{i}", partial(draw, work, path, i)) for i in range(s.n)]
    recalls = list(zip(*(work.recalls(answers, rows) for answers in drawn), strict=True))  # (rows, n)
    told = []
    for i, of in enumerate(recalls):
        leaks = sum(recall >= s.tau for recall in of)
        worded = of[0] == of[0]
        told.append(
            {
                "row": i,
                "leaks": leaks if worded else None,
                "bound": upper_bound(leaks, s.n, s.confidence) if worded else None,
                "best_rouge": max(of),
                "rouge": list(of),
                "answers": [answers[i] for answers in drawn],
            }
        )
    graded = [of for of in recalls if of[0] == of[0]]  # a true answer without words has no ROUGE
    counts = [sum(recall >= s.tau for recall in of) for of in graded]
    results: list[Result] = []
    for k in sorted(s.k or [2**i for i in range(s.n.bit_length())]):
        values = {"leak": leak_at_k(s.n, counts, k), "best_rouge": mean([expected_best(of, k) for of in graded])}
        if k == 1 and graded:
            values["leak_bound"] = upper_bound(sum(counts), s.n * len(graded), s.confidence)
        setting = f"k={k} of n={s.n} temperature={s.temperature:g} top_p={s.top_p:g} tau={s.tau:g}"
        results.append(Result(setting, values, told if not results else [], len(graded)))
    return results


def draw(work: Work, path: str, number: int) -> list[str]:
    """One drawn answer to each forget question."""
    import torch

    from unlearn.passes.decoding import sampled_answers

    s, how = work.settings.sample, work.models.at(path)
    rows = work.models.tokenize(work.rows["forget"])
    generator = torch.Generator().manual_seed((work.settings.seed << 20) + number)
    what = f"{Path(path).name}, answers {number + 1} of {s.n}"
    most = work.settings.max_new_tokens
    return sampled_answers(how, rows, work.models.tokenizer, generator, s.temperature, None, most, what, s.top_p)


# ---- asked otherwise ----


def prefix(work: Work, path: str, part: Part) -> list[Result]:
    """The forget questions inside each template."""
    rows = work.rows["forget"]
    return by_ways(work, path, part, {one.name: [one.ask(row) for row in rows] for one in templates_of(work.settings)})


def paraphrase(work: Work, path: str, part: Part) -> list[Result]:
    """The forget questions in each of the other words that there are."""
    from unlearn.attacks.asking import rephrased

    asked = [rephrased(row, work.settings.paraphrase.columns) for row in work.rows["forget"]]
    most = max(map(len, asked))
    return by_ways(work, path, part, {f"{i + 1}": [of[i] if i < len(of) else None for of in asked] for i in range(most)})


def by_ways(work: Work, path: str, part: Part, asked: Mapping[str, Sequence[dict[str, Any] | None]]) -> list[Result]:
    """The forget rows' scores asked plainly and in each way (None: not in this one), and over ways the mean and the worst."""

    def measure(name: str) -> Rows:
        rows = [row for row in asked[name] if row is not None]
        return work.scored(work.models.at(path), rows, f"{Path(path).name}, {name}") if rows else []

    plain = part("plain", lambda: work.plain(path, "forget"))
    ways: dict[str, list[dict[str, Any] | None]] = {}
    for name, rows in asked.items():
        found = iter(part(f"way_{name}", partial(measure, name)))
        ways[name] = [None if row is None else next(found) for row in rows]
    told = [{"row": i, "way": name} | row for name, of in ways.items() for i, row in enumerate(of) if row is not None]
    results = [
        Result("plain", of_forget(plain), [{"row": i, "way": "plain"} | row for i, row in enumerate(plain)] + told, len(plain))
    ]
    for name, of in ways.items():
        there = [row for row in of if row is not None]
        results.append(Result(name, of_forget(there), [], len(there)))
    by_row = [of for of in zip(*ways.values(), strict=True) if any(of)]
    for name in ("mean", "worst"):
        over = [over_ways([row for row in of if row is not None], name == "worst") for of in by_row]
        results.append(Result(name, of_forget(over), [], len(over)))
    return results


def over_ways(of: Rows, worst: bool) -> dict[str, float]:
    """One row's scores over its ways of being asked: their mean, or of each the one that gives most away."""
    from unlearn.attacks.asking import worst as worst_of
    from unlearn.scores.definitions import mean

    columns = {key: [row[key] for row in of] for key in of[0] if key != "answer"}
    if not worst:
        return {key: mean(values) for key, values in columns.items()}
    found = {key: worst_of(values, lowest=key == "loss") for key, values in columns.items()}
    return found | {"tokens": columns["tokens"][columns["loss"].index(found["loss"])]}
