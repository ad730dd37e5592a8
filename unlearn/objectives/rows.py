"""Texts to token ids with labels on the answer, and rows to padded batches.

Letters: B rows, T tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unlearn.objectives.tokens import IGNORE, label_positions

# input_ids and labels, each (T,); ref_nll, (label tokens,), where there is a reference; `second`, such a row or a list of
# such rows, where needed
Row = dict[str, Any]


def tokenize_pairs(
    pairs: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 500,
    prompt_loss: int = 0,
    special_tokens: bool | None = None,
    places: Sequence[str] | None = None,
) -> list[Row]:
    """(prompt, answer) texts to token ids, with labels on the answer's tokens and one end-of-sequence token.

    The boundary is a character offset of the one tokenised text: a token that reaches past it is the answer's.

    Args:
        max_length: tokens a row keeps at most.
        prompt_loss: how many of the prompt's last characters count as answer.
        special_tokens: whether the tokenizer adds its own; None: to texts that do not begin with them (as those of a chat
            template do).
        places: what to call each row in what is said of it; None: its number.

    Raises:
        ValueError: a row's prompt leaves no room for an answer, or the tokenizer has no end-of-sequence token or gives
            no offsets.
    """
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise ValueError(f"{tokenizer.name_or_path}: needs a fast tokenizer with an end-of-sequence token")
    encoded = _encode([prompt + answer for prompt, answer in pairs], tokenizer, special_tokens)
    rows = []
    for number, (ids, ends) in enumerate(encoded, start=1):
        boundary = len(pairs[number - 1][0]) - prompt_loss
        rows.append(_to_row(ids, ends, boundary, tokenizer.eos_token_id, max_length))
        if (rows[-1]["labels"] == IGNORE).all():
            place = f"row {number}" if places is None else places[number - 1]
            raise ValueError(f"{place}: its prompt alone fills max_length={max_length} tokens")
    return rows


Encoded = tuple[list[int], list[int]]  # a text's tokens, and the character behind each; 0 for those of no text


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, special_tokens: bool | None) -> list[Encoded]:
    if special_tokens is None:
        bare, full = (_encode(texts, tokenizer, special) for special in (False, True))
        return [one if _begins_with_added(one, other) else other for one, other in zip(bare, full, strict=True)]
    encoded = tokenizer(list(texts), add_special_tokens=special_tokens, return_offsets_mapping=True)
    ends = ([end for _, end in offsets] for offsets in encoded["offset_mapping"])
    return list(zip(encoded["input_ids"], ends, strict=True))


def _begins_with_added(bare: Encoded, full: Encoded) -> bool:
    """Whether the text itself begins with the tokens that the tokenizer adds at its front."""
    of_no_text = [next((i for i, end in enumerate(ends) if end), len(ends)) for _, ends in (bare, full)]
    added = full[0][: of_no_text[1] - of_no_text[0]]
    return bool(added) and bare[0][: len(added)] == added


def _to_row(ids: list[int], ends: list[int], boundary: int, eos: int, max_length: int) -> Row:
    while ids and ids[-1] == eos and (ends[-1] == 0 or ends[-1] > boundary):  # the tokenizer's own, or the text's
        ids, ends = ids[:-1], ends[:-1]
    labels = [token if end > boundary else IGNORE for token, end in zip(ids, ends, strict=True)] + [eos]
    labels[0] = IGNORE  # nothing stands before it to predict it from
    return {"input_ids": torch.tensor([*ids, eos][:max_length]), "labels": torch.tensor(labels[:max_length])}


def collate(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """Pad rows to the longest of them: `input_ids`, `attention_mask` and `labels`, each (B, T)."""
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    padded = {
        key: torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=value)
        for key, value in (("input_ids", pad), ("labels", IGNORE))
    }
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # by length: the end-of-sequence id may be the padding's
    return padded | {"attention_mask": mask.long()}


def seconds(row: Row) -> list[Row]:
    """The row's second answers: none, one or several."""
    found = row.get("second", [])
    return found if isinstance(found, list) else [found]


def visited(row: Row, visit: int) -> Row:
    """The row as its `visit`-th visit trains on it: of several second answers one, in turn."""
    several = row.get("second")
    return row | {"second": several[visit % len(several)]} if isinstance(several, list) else row


def forget_batch(rows: Sequence[Row], beside: Sequence[Row], pad: int) -> dict[str, Any]:
    """A batch of rows to forget, of `beside`, and last the second answers of either, where they have some; see `Loss`."""
    kinds = {"": rows, "retain_": beside}
    second = {kind: [other for row in of for other in seconds(row)] for kind, of in kinds.items()}
    batch: dict[str, Any] = collate([*rows, *beside, *second[""], *second["retain_"]], pad)
    for kind, of in kinds.items():
        for ones, key in ((of, f"{kind}ref_nll"), (second[kind], f"{kind}second_ref_nll")):
            if ones and "ref_nll" in ones[0]:
                batch[key] = torch.cat([row["ref_nll"] for row in ones])
        batch[f"n_{kind}second"] = len(second[kind])
        if any(isinstance(row.get("second"), list) for row in of):
            batch[f"{kind}second_of"] = torch.tensor([i for i, row in enumerate(of) for _ in seconds(row)])
    return _placed(batch | {"n_forget": len(rows)}, (len(rows), len(beside), len(second[""])))


def _placed(batch: dict[str, Any], rows: tuple[int, int, int]) -> dict[str, Any]:
    """The batch with where its label tokens are, told on the CPU: where the batch goes it would be waited for.

    Args:
        rows: to forget, beside them, and second answers of the first.
    """
    at = label_positions(batch["labels"])
    row, ends = at // batch["labels"].shape[1], [0, *accumulate(rows)]
    before = [int((row < end).sum()) for end in ends]
    return batch | {"at": at, "n_tokens": tuple(b - a for a, b in zip(before, before[1:], strict=False))}


def parts_of(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch's rows to forget, with their second answers, and those beside them, as two batches of the same step."""
    n, b = batch["n_forget"], len(batch["labels"])
    n_second, n_beside = batch.get("n_second", 0), batch.get("n_retain_second", 0)
    seconds_at = b - n_second - n_beside
    of_forget = [*range(n), *range(seconds_at, b - n_beside)]
    of_retain = [*range(n, seconds_at), *range(b - n_beside, b)]
    parts = []
    for rows, sizes, other in (
        (of_forget, {"n_forget": n, "n_second": n_second, "n_retain_second": 0}, "retain"),
        (of_retain, {"n_forget": 0, "n_second": 0, "n_retain_second": n_beside}, "forget"),
    ):
        part = dict(batch) | sizes | {key: batch[key][rows] for key in ("input_ids", "attention_mask", "labels")}
        n_beside_here = len(rows) - sum(sizes.values())
        part = _placed(part, (sizes["n_forget"], n_beside_here, sizes["n_second"]))
        parts.append(part | ({"rows": batch["rows"] | {other: []}} if "rows" in batch else {}))
    for key in ("ref_nll", "second_ref_nll", "second_of"):
        parts[0].pop(f"retain_{key}", None)
        parts[1].pop(key, None)
    return parts[0], parts[1]


def counts(rows: Sequence[Row]) -> tuple[int, int]:
    """Label tokens and rows."""
    return sum(int((row["labels"] != IGNORE).sum()) for row in rows), len(rows)
