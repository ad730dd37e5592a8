"""What a stage of the work needs of memory and disk, by arithmetic: no weights are made, and nothing is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unlearn.models.sharding import SPARE
from unlearn.models.trained import matching

HALF, FULL = 2, 4  # bytes of a number
MEASURED_ROWS = 16  # a batch of what is not trained
FRAGMENTS = 1.08  # what a CPU's allocator holds beside what is in use


@dataclass(frozen=True)
class Shape:
    """A model, as far as its size goes.

    Attributes:
        linear: in and out features of each linear layer but the head, by its name.
        sizes: the numbers of each parameter, by its name, tied ones once.
    """

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_values: int
    vocabulary: int
    tied: bool
    linear: Mapping[str, tuple[int, int]]
    sizes: Mapping[str, int]

    def trained(self, r: int, pattern: str | None) -> dict[str, int]:
        """The numbers of each parameter that is trained: an adapter's alone, where `r` is not 0; those of `trainable`."""
        sizes = dict(self.sizes)
        if r:
            pairs = [(name, {"A": r * a, "B": r * b}) for name, (a, b) in self.linear.items()]
            sizes = {f"{name}.lora_{letter}.default.weight": n for name, of in pairs for letter, n in of.items()}
        return sizes if pattern is None else {name: sizes[name] for name in matching(pattern, sizes)}


def shape_of(config: PreTrainedConfig) -> Shape:
    """The shape of the causal LM that a configuration makes."""
    with torch.device("meta"):
        return shape_of_model(AutoModelForCausalLM.from_config(config))


def shape_of_model(model: PreTrainedModel) -> Shape:
    """The shape of a causal LM that is there."""
    text = model.config.get_text_config()
    head = model.get_output_embeddings()
    linear = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        parameters=model.num_parameters(),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=heads,
        key_values=size * (getattr(text, "num_key_value_heads", None) or heads),
        vocabulary=text.vocab_size,
        tied=head.weight is model.get_input_embeddings().weight,
        linear={name: (inner, outer) for name, (outer, inner) in linear.items()},
        sizes={name: parameter.numel() for name, parameter in model.named_parameters()},
    )


@dataclass(frozen=True)
class Work:
    """How the work is done.

    Attributes:
        rows: of a micro-batch, a process; with a retain term there are as many retain rows beside.
        tokens, labels: of a long row.
        optimizer: bytes of state a trained parameter, for float32 weights.
        trainable: only parameters in whose names it is found are trained; None: all.
        before: the trained weights as they were are kept in CPU memory.
        checkpoints: how many the run leaves; `saved`: bytes a number in them; `merged`: with adapters also the whole model.
        gradients: how many are kept apart in a step; `average`: and a moving average of one.
        norms, offload: of the G-effects: with the gradient's norm; V in CPU memory.
    """

    rows: int
    tokens: int
    labels: int
    optimizer: float = 8
    weight: int = FULL
    bf16: bool = True
    checkpointing: bool = False
    lora: int = 0
    trainable: str | None = None
    before: bool = False
    retain: bool = False
    reference: bool = False
    shards: int = 1
    gpu: bool = True
    checkpoints: int = 1
    saved: int = FULL
    merged: bool = False
    norms: bool = True
    offload: bool = False
    gradients: int = 1
    average: bool = False


@dataclass
class Need:
    """A stage's memory on each process, in bytes by what it is for, and its disk."""

    stage: str
    memory: dict[str, float]
    disk: dict[str, float] = field(default_factory=dict)
    fragments: float = 1.0

    @property
    def peak(self) -> float:
        return self.fragments * sum(self.memory.values())


def activations(shape: Shape, work: Work, tokens: float, row: float) -> float:
    """What a forward pass keeps for the backward pass, in bytes, logits apart.

    A layer keeps of each token: in float32 the inputs of both norms, what they normalise, and both residual sums (6 h); in the
    precision of products the inputs of all matrices, queries, keys and values before and after rotation, the attention's
    output, and the MLP's gate, its activation and its product (4 f); where attention is not fused also its weights, before
    and after softmax.
    """
    x = HALF if work.bf16 or work.weight == HALF else FULL
    each: float = 6 * FULL * shape.hidden
    each += x * (6 * shape.hidden + 4 * shape.key_values + 4 * shape.intermediate)
    if not work.gpu:
        each += shape.heads * row * (2 * x + FULL)
    if work.lora:  # each adapter's input in float32, after dropout, its mask, and its product's input
        each += sum(a for a, _ in shape.linear.values()) / shape.layers * (2 * FULL + 1 + x)
    if work.checkpointing:
        return tokens * (shape.layers * FULL * shape.hidden + each)
    return tokens * shape.layers * each


def logits(shape: Shape, labels: float, copies: float, bf16: bool) -> float:
    """Logits as the head gives them, and `copies` of them in float32: wide, as log-probabilities, both ones' gradients."""
    return labels * shape.vocabulary * ((HALF if bf16 else 0) + copies * FULL)


def held(shape: Shape, work: Work) -> dict[str, float]:
    """What is there all the while: the weights, and where they are in shards two blocks of them whole, as they are run."""
    bytes_ = float(work.weight * shape.parameters)
    found = {"weights": bytes_ / work.shards}
    if work.shards > 1:
        found["blocks gathered"] = 2.0 * run_in(work) * shape.parameters / (shape.layers + 1)
    elif work.bf16 and work.weight == FULL:  # autocast's, from the forward to the backward pass
        found["weights in bfloat16"] = float(HALF * shape.parameters)
    if work.reference and not work.lora:
        found["reference model"] = bytes_ / work.shards
    return found


def run_in(work: Work) -> int:
    """Bytes of a weight as products have it."""
    return HALF if work.bf16 else work.weight


def trained(shape: Shape, work: Work) -> int:
    """How many numbers are trained."""
    return sum(shape.trained(work.lora, work.trainable).values())


def width(work: Work) -> int:
    """Bytes of a trained number: adapters are in float32 whatever the weights are in."""
    return FULL if work.lora else work.weight


def largest(shape: Shape, work: Work) -> int:
    """Numbers of the largest trained tensor: an adapter's, or the embeddings."""
    return max(shape.trained(work.lora, work.trainable).values())


def optimiser(shape: Shape, work: Work) -> float:
    return work.optimizer * width(work) / FULL * trained(shape, work) / work.shards


def training(shape: Shape, work: Work) -> Need:
    """A training step's peak, and the disk of a run: its checkpoints, and twice what a killed run goes on from."""
    p = trained(shape, work)
    saved = p if work.lora else shape.parameters
    sets = 2 if work.retain else 1
    memory = held(shape, work)
    if work.lora:
        memory["adapters"] = float(FULL * p)
    memory["gradients"] = work.gradients * width(work) * p / work.shards
    if work.average:
        memory["average gradient"] = width(work) * p / work.shards
    memory["optimiser"] = optimiser(shape, work)
    embeddings = shape.vocabulary * shape.hidden
    if (
        shape.tied and embeddings in shape.trained(work.lora, work.trainable).values()
    ):  # both uses' gradients before they are added
        memory["gradients of the tied head"] = 2.0 * width(work) * embeddings
    else:  # a micro-batch's gradient of the largest weight, before it is added to those before it
        memory["gradient of a tensor"] = float(width(work) * largest(shape, work))
    whole = work.lora or (work.trainable is not None and FULL * p <= max(memory["weights"], SPARE))  # `few_are_trained`
    if work.shards > 1 and not whole:  # of two blocks, as they come and as they are reduced
        memory["gradients not yet reduced"] = 2.0 * (run_in(work) + FULL) * shape.parameters / (shape.layers + 1)
    elif work.shards > 1:
        memory["gradients not yet reduced"] = float(FULL * p)
    tokens = sets * work.rows * work.tokens
    memory["activations"] = activations(shape, work, tokens, work.tokens)
    memory["gradients of activations"] = tokens * run_in(work) * (2.0 * shape.intermediate + 4 * shape.hidden)  # of one layer
    memory["logits"] = logits(shape, sets * work.rows * work.labels, 4, work.bf16)
    if work.reference:
        memory["logits of the reference"] = logits(shape, work.rows * work.labels, 5, work.bf16)
    if work.before and not (work.gpu or work.lora):
        memory["trained weights as they were"] = float(work.weight * p)
    disk = {"checkpoints": float(work.checkpoints * work.saved * saved)}
    disk["to go on from"] = 2 * (FULL * saved + work.optimizer * p + width(work) * p * work.average)
    if work.lora and work.merged:
        disk["merged model"] = float(work.saved * shape.parameters)
    return Need("training", memory, disk, 1 if work.gpu else FRAGMENTS)


def measuring(shape: Shape, work: Work, optimizer: bool) -> Need:
    """G-effects: V of two risks, the sum it is accumulated in (with norms the gradient's); the step's gradient is gone."""
    p = trained(shape, work)
    memory = held(shape, work)
    if optimizer:
        memory["optimiser"] = optimiser(shape, work)
    if not work.offload:
        memory["directions V"] = 2.0 * width(work) * p / work.shards
    if work.norms or width(work) == HALF or work.offload:
        memory["sum in float32"] = FULL * p / work.shards
    memory["gradient of a tensor"] = float(width(work) * largest(shape, work))
    memory["activations"] = activations(shape, work, MEASURED_ROWS * work.tokens, work.tokens)
    memory["logits"] = logits(shape, MEASURED_ROWS * work.labels, 3, work.bf16)
    return Need("G-effects", memory, {}, 1 if work.gpu else FRAGMENTS)


def scoring(shape: Shape, work: Work, models: int) -> Need:
    """Teacher forcing and decoding: weights (of several models for the control search), keys and values, logits."""
    memory = held(shape, work)
    memory["weights"] *= models
    keys = 2 * shape.key_values * shape.layers * (HALF if work.bf16 else FULL)
    memory["keys and values"] = float(4 * MEASURED_ROWS * 2 * work.tokens * keys)  # four times the rows are decoded at once
    memory["logits"] = logits(shape, MEASURED_ROWS * work.labels, 3, work.bf16)
    return Need("scores", memory, {}, 1 if work.gpu else FRAGMENTS)


def table(needs: list[Need]) -> str:
    """The needs as lines, in GiB."""
    lines = []
    for need in needs:
        lines.append(f"{need.stage}: {need.peak / 2**30:.2f} GiB of memory a process")
        lines += [f"    {value / 2**30:8.2f}  {name}" for name, value in need.memory.items()]
        if need.fragments > 1:
            lines.append(f"    {(need.fragments - 1) * need.peak / need.fragments / 2**30:8.2f}  allocator")
        if need.disk:
            lines.append(f"  {sum(need.disk.values()) / 2**30:.2f} GiB of disk")
            lines += [f"    {value / 2**30:8.2f}  {name}" for name, value in need.disk.items()]
    return "\n".join(lines)
