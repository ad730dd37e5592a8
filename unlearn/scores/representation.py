"""What unlearning does to the outputs of each layer: linear CKA and cosines between two models on the same tokens.

Letters: N label tokens, L layers (the embeddings, then every block; the last after the final norm), d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unlearn.models.evaluating import unwrap
from unlearn.objectives.rows import Row, collate
from unlearn.objectives.tokens import IGNORE, label_positions, outputs_at
from unlearn.passes.forcing import Pass, check_labels, over_batches
from unlearn.passes.sizes import Size, cut

MOST = 2048  # label tokens that are compared


def linear_cka(x: Tensor, y: Tensor) -> float:
    """|Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms of column-centred outputs: 1 where they differ by a rotation and a scale.

    Kornblith et al. 2019 (arXiv 1905.00414, equation 5). Where there are fewer tokens than features, the same from the
    tokens' inner products. Nan where one of the two is the same for all tokens.

    Args:
        x, y: (N, d) and (N, e), of the same tokens.
    """
    x, y = (of.double() - of.double().mean(dim=0) for of in (x, y))
    if len(x) < max(x.shape[1], y.shape[1]):
        k, l = x @ x.T, y @ y.T  # noqa: E741
        across, sizes = (k * l).sum(), k.norm() * l.norm()
    else:
        across, sizes = (y.T @ x).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    return float(across / sizes) if sizes > 0 else float("nan")


def mean_cosine(x: Tensor, y: Tensor) -> float:
    """The mean over tokens of the cosine of the two outputs, (N, d) each."""
    return float(torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).mean())


def layer_names(n: int) -> list[str]:
    """Of L = n outputs, as the G-effects by layer have them: the embeddings, then the blocks by number."""
    return ["embed", *map(str, range(n - 1))]


def hidden_states(how: Pass, rows: Sequence[Row], most: int | None = MOST, what: str = "layers' outputs") -> Tensor:
    """(N, L, d) every layer's output at the positions that predict the rows' label tokens, from one pass, on the CPU.

    Args:
        most: of more tokens so many, evenly apart, so that two models' are of the same ones; None: all.

    Raises:
        ValueError: a row has no label token, or its first token has a label.
    """
    check_labels(rows, what)
    chosen = _chosen([int((row["labels"] != IGNORE).sum()) for row in rows], most)
    layers = tuple(range(unwrap(how.model).config.get_text_config().num_hidden_layers + 1))
    widths = [len(row["input_ids"]) for row in rows]

    def planned(numbers: list[int], size: Size) -> list[list[int]]:
        return cut(numbers, widths, size)

    def measure(batch: list[int]) -> list[Tensor]:
        inputs = {key: x.to(how.model.device) for key, x in collate([rows[i] for i in batch], how.pad).items()}
        kept = torch.cat([chosen[i] for i in batch]).to(how.model.device)
        found = outputs_at(how.model, inputs, label_positions(inputs["labels"])[kept], layers, head=False)[1]
        assert found is not None
        return list(found.cpu().split([int(chosen[i].sum()) for i in batch]))

    order = sorted(range(len(rows)), key=lambda i: -widths[i])
    with how.evaluating():
        found = over_batches(how, "losses", [[i] for i in order], widths, planned, measure, what)
    return torch.cat([found[i] for i in range(len(rows))])


def _chosen(counts: Sequence[int], most: int | None) -> list[Tensor]:
    """For each row which of its label tokens are taken, (label tokens,) of booleans."""
    total = sum(counts)
    taken = torch.ones(total, dtype=torch.bool)
    if most is not None and total > most:
        taken = torch.zeros(total, dtype=torch.bool)
        taken[torch.arange(most) * total // most] = True
    return list(taken.split(list(counts)))
