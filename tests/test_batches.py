"""From rows to a step's batches: padding, which rows a step has, its counts, and the reference's losses beside the tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from dataloader import (
    Row,
    StepBatches,
    counts,
    stream,
)
from unlearn.objectives.rows import collate
from unlearn.objectives.tokens import IGNORE, label_positions


def numbered_rows(n: int, first: int) -> list[Row]:
    """Rows of 4 to 13 tokens, 1 to 6 of them the answer's. A row begins with its number, and so do its reference losses."""
    rows = []
    for i in range(n):
        length, answer = 4 + (7 * i) % 10, 1 + (5 * i) % 6
        ids = torch.full((length,), 1)
        ids[0] = first + i
        labels = torch.where(torch.arange(length) < max(1, length - answer), IGNORE, ids)
        ref_nll = (first + i) + torch.arange(int((labels != IGNORE).sum())) / 100
        rows.append({"input_ids": ids, "labels": labels, "ref_nll": ref_nll})
    return rows


FORGET, RETAIN = numbered_rows(24, 1000), numbered_rows(50, 2000)


def test_collate() -> None:
    rows = FORGET[:5]
    batch = collate(rows, pad=9)
    width = max(len(row["input_ids"]) for row in rows)
    assert {key: value.shape for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), (5, width)
    )
    for i, row in enumerate(rows):
        ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
        padding = width - len(ids)
        assert batch["input_ids"][i].tolist() == ids + [9] * padding
        assert batch["labels"][i].tolist() == labels + [IGNORE] * padding
        assert batch["attention_mask"][i].tolist() == [1] * len(ids) + [0] * padding


@pytest.mark.parametrize("seed", [0, 42])
def test_stream(seed: int) -> None:
    order = stream(7, 25, seed, "forget")
    assert len(order) == 25
    epochs = [order[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(stream(7, n, seed, "forget") == order[:n] for n in range(25))  # more steps begin with the same ones
    assert stream(7, 25, seed, "retain") != order
    assert stream(7, 25, seed + 1, "forget") != order


def cut(batch_size: int, accumulation: int, processes: int, steps: int = 6, seed: int = 0) -> StepBatches:
    return StepBatches(FORGET, RETAIN, steps, batch_size, accumulation * processes, seed, 0)


def by_step(batches: StepBatches) -> list[list[dict[str, Any]]]:
    items = [batches[i] for i in range(len(batches))]
    n = batches.batches_per_step
    return [items[i : i + n] for i in range(0, len(items), n)]


def numbers(step: list[dict[str, Any]], part: str) -> list[int]:
    """Which forget or retain rows a step has, in its order."""
    return [
        row
        for item in step
        for row in item["input_ids"][slice(item["n_forget"]) if part == "forget" else slice(item["n_forget"], None), 0].tolist()
    ]


CUTS = {"1 x 8": cut(8, 1, 1), "2 processes x 4": cut(4, 1, 2), "4 x accumulation 2": cut(4, 2, 1), "2 x 2 x 2": cut(2, 2, 2)}


@pytest.mark.parametrize("name", CUTS)
def test_a_steps_rows_do_not_depend_on_how_it_is_cut(name: str) -> None:
    whole, parts = by_step(CUTS["1 x 8"]), by_step(CUTS[name])
    assert len(whole) == len(parts) == 6
    for one, several in zip(whole, parts, strict=True):
        for part in ("forget", "retain"):
            assert Counter(numbers(several, part)) == Counter(numbers(one, part))
        for key in ("forget_counts", "retain_counts"):
            assert {item[key] for item in several} == {one[0][key]}


def test_a_batch_names_its_rows_as_the_split_has_them() -> None:
    """From 1 on, the held-out ones counted: what a loss that is not finite is told with."""
    batches = StepBatches(FORGET, RETAIN, 6, 4, 2, 0, 0, first=(1, 41))
    for step, items in enumerate(by_step(batches)):
        for part, first, order in (("forget", 1, batches.forget_order), ("retain", 41, batches.retain_order)):
            assert [row for item in items for row in item["rows"][part]] == [first + row for row in order[step]]


@pytest.mark.parametrize("name", CUTS)
def test_no_short_batch(name: str) -> None:
    batches = CUTS[name]
    for step in by_step(batches):
        assert len(step) == batches.batches_per_step
        assert all(item["n_forget"] == batches.batch_size for item in step)
        assert all(len(item["input_ids"]) == 2 * batches.batch_size for item in step)


@pytest.mark.parametrize("n_rows", [3, 5, 13])
def test_no_short_batch_where_the_rows_do_not_divide(n_rows: int) -> None:
    """An epoch ends within a step, or several do, and its last rows share the step with the next one's first."""
    batches = StepBatches(FORGET[:n_rows], [], steps=5, batch_size=2, batches_per_step=2, seed=0, pad=0)
    seen = Counter(row for step in by_step(batches) for row in numbers(step, "forget"))
    assert len(batches) == 10
    assert sum(seen.values()) == 20
    assert set(seen.values()) <= {20 // n_rows, 20 // n_rows + 1}
    assert set(seen) == {1000 + i for i in range(n_rows)}


@pytest.mark.parametrize("name", CUTS)
def test_a_step_is_sorted_by_length(name: str) -> None:
    for step in by_step(CUTS[name]):
        for part, rows, first in (("forget", FORGET, 1000), ("retain", RETAIN, 2000)):
            lengths = [len(rows[number - first]["input_ids"]) for number in numbers(step, part)]
            assert lengths == sorted(lengths, reverse=True)
            assert len(set(lengths)) > 1


@pytest.mark.parametrize("name", CUTS)
def test_the_counts_are_the_whole_steps(name: str) -> None:
    for step in by_step(CUTS[name]):
        forget = [item["labels"][: item["n_forget"]] for item in step]
        retain = [item["labels"][item["n_forget"] :] for item in step]
        for item in step:
            assert item["forget_counts"] == (sum(len(label_positions(labels)) for labels in forget), 8)
            assert item["retain_counts"] == (sum(len(label_positions(labels)) for labels in retain), 8)


def test_epochs_of_steps() -> None:
    """24 rows are 3 steps of 8: each epoch has each row once. The 50 retain rows come from a longer stream of their own."""
    steps = by_step(CUTS["2 processes x 4"])
    for epoch in (steps[:3], steps[3:]):
        assert sorted(row for step in epoch for row in numbers(step, "forget")) == list(range(1000, 1024))
    retain = [row for step in steps for row in numbers(step, "retain")]
    assert len(set(retain)) == len(retain) == 48


def test_the_seed_is_the_order() -> None:
    same, other = cut(4, 2, 1), cut(4, 2, 1, seed=1)
    assert (same.forget_order, same.retain_order) == (CUTS["1 x 8"].forget_order, CUTS["1 x 8"].retain_order)
    assert other.forget_order != same.forget_order
    assert other.retain_order != same.retain_order


def test_more_steps_begin_with_the_same_ones() -> None:
    few, many = cut(4, 2, 1, steps=2), cut(4, 2, 1, steps=9)
    assert many.forget_order[:2] == few.forget_order
    assert many.retain_order[:2] == few.retain_order


@pytest.mark.parametrize("name", CUTS)
def test_reference_losses_stand_beside_their_tokens(name: str) -> None:
    for item in (CUTS[name][i] for i in range(len(CUTS[name]))):
        n = item["n_forget"]
        forget = item["input_ids"][:n, 0]  # the rows' numbers
        rows = label_positions(item["labels"][:n]) // item["labels"].shape[1]
        assert item["ref_nll"].int().tolist() == forget[rows].tolist()
        assert torch.equal(item["ref_nll"], torch.cat([FORGET[number - 1000]["ref_nll"] for number in forget.tolist()]))


def test_without_retain_rows() -> None:
    batches = StepBatches(numbered_rows(4, 0), [], steps=1, batch_size=4, batches_per_step=1, seed=0, pad=0)
    assert (batches[0]["n_forget"], len(batches[0]["labels"]), batches[0]["retain_counts"]) == (4, 4, (0, 0))


def test_counts() -> None:
    assert counts(FORGET[:3]) == (sum(len(row["ref_nll"]) for row in FORGET[:3]), 3)
