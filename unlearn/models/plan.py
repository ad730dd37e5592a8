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
        rms: whether its norms are root mean squares written out, as Llama's, and not PyTorch's layer norms.
        kept: how many tensors of the intermediate size an MLP keeps of each token for its backward pass.
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
    rms: bool
    kept: int
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
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    gated = sum(outer for outer, _ in linear.values() if outer in (inner, 2 * inner)) == 2 * inner * text.num_hidden_layers
    written_out = getattr(text, "hidden_act", getattr(text, "activation_function", "")) in ("gelu_new", "gelu_fast")
    return Shape(
        parameters=model.num_parameters(),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=inner,
        heads=heads,
        key_values=size * (getattr(text, "num_key_value_heads", None) or heads),
        vocabulary=text.vocab_size,
        tied=head.weight is model.get_input_embeddings().weight,
        rms=any("RMSNorm" in type(module).__name__ for module in model.modules()),
        kept=4 if gated else 5 if written_out else 2,
        linear={name: (inner, outer) for name, (outer, inner) in linear.items()},
        sizes={name: parameter.numel() for name, parameter in model.named_parameters()},
    )


@dataclass(frozen=True)
class Work:
    """How the work is done.

    Attributes:
        rows: of a micro-batch, a process; with a retain term there are as many retain rows beside.
        tokens, labels: of a long row; `later`: tokens of the longest after a step's first micro-batch (None: as many).
        accumulated: micro-batches of a step.
        buckets: gradients lie in DistributedDataParallel's, which stay.
        optimizer: bytes of state a trained parameter, for float32 weights.
        trainable: only parameters in whose names it is found are trained; None: all.
        before: the trained weights as they were are kept in CPU memory.
        checkpoints: how many the run leaves; `saved`: bytes a number in them; `merged`: with adapters also the whole model.
        gradients: how many are kept apart in a step; `average`: and a moving average of one.
        tapped, norms, offload: of the G-effects: by the tapped pass; with the gradient's norm; V in CPU memory.
        ruled: of the G-effects: also those of a gradient rule's step.
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
    tapped: bool = False
    norms: bool = True
    offload: bool = False
    gradients: int = 1
    average: bool = False
    ruled: bool = False
    accumulated: int = 1
    later: int | None = None
    buckets: bool = False


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


def kept_of_a_layer(shape: Shape, work: Work, row: float) -> float:
    """What a layer keeps of a token for its backward pass, in bytes; `row`: tokens of its row.

    In the precision of products: queries and keys as they are rotated, values, the attention's output (4 h); the MLP's two
    products, the activation and what goes into the last one (4 f). Of Llama's norms, in a residual stream of half precision:
    its float32 copy, what is normalised, what is weighed (two norms); in one of float32: the stream, what is normalised, and
    what goes into the products, under autocast cast for each of the five. Layer norms keep the stream and what they give.
    Where attention is not fused also its weights, in float32 and as they are multiplied.
    """
    x, stream = run_in(work), stream_in(work)
    each: float = x * (4 * shape.hidden + shape.kept * shape.intermediate)
    if not shape.rms:
        each += (2 * stream + 3 * x) * shape.hidden
    elif stream == HALF:
        each += 2 * (FULL + 2 * HALF) * shape.hidden
    else:
        each += (4 * FULL + (5 * HALF if x == HALF else 2 * FULL)) * shape.hidden
    if not work.gpu:
        each += shape.heads * row * (FULL + (HALF if x == HALF else 0))
    if work.lora:  # each adapter's input in float32, after dropout, its mask, and its product's input
        each += sum(a for a, _ in shape.linear.values()) / shape.layers * (2 * FULL + 1 + x)
    return each


def activations(shape: Shape, work: Work, tokens: float, row: float) -> float:
    """What a forward pass keeps for the backward pass, in bytes, logits apart: with checkpointing, layers' inputs."""
    each = stream_in(work) * shape.hidden if work.checkpointing else kept_of_a_layer(shape, work, row)
    return tokens * shape.layers * each


def in_a_layer(shape: Shape, work: Work, tokens: float, row: float) -> float:
    """What a layer's backward pass takes beside: gradients of an MLP's and of two streams', and what is computed again."""
    again = kept_of_a_layer(shape, work, row) if work.checkpointing else 0
    return tokens * (again + run_in(work) * 2 * shape.intermediate + FULL * 2 * shape.hidden)


def logits(shape: Shape, labels: float, copies: float = 3) -> float:
    """Float32 logits of label tokens: log-probabilities, the loss's gradient, and theirs; before it no more than these."""
    return labels * shape.vocabulary * copies * FULL


def held(shape: Shape, work: Work) -> dict[str, float]:
    """What is there all the while: the weights, and where they are in shards two blocks of them whole, as they are run."""
    bytes_ = float(work.weight * shape.parameters)
    found = {"weights": bytes_ / work.shards}
    if work.shards > 1:
        found["blocks gathered"] = 2.0 * run_in(work) * shape.parameters / (shape.layers + 1)
    if work.reference and not work.lora:
        found["reference model"] = bytes_ / work.shards
    return found


def cast(shape: Shape, work: Work) -> dict[str, float]:
    """Autocast's copies of the weights in products, from where a forward pass makes them until the backward pass is past."""
    if work.shards > 1 or not work.bf16 or work.weight == HALF:
        return {}
    looked_up = 0 if shape.tied else shape.vocabulary * shape.hidden
    return {"weights in bfloat16": float(HALF * (shape.parameters - looked_up))}


def run_in(work: Work) -> int:
    """Bytes of a weight as products have it."""
    return HALF if work.bf16 else work.weight


def stream_in(work: Work) -> int:
    """Bytes of a number of the residual stream: embeddings', which autocast leaves as they are."""
    return HALF if work.bf16 and work.shards > 1 else work.weight


def trained(shape: Shape, work: Work) -> int:
    """How many numbers are trained."""
    return sum(shape.trained(work.lora, work.trainable).values())


def width(work: Work) -> int:
    """Bytes of a trained number: adapters are in float32 whatever the weights are in."""
    return FULL if work.lora else work.weight


def largest(shape: Shape, work: Work, within: bool = False) -> int:
    """Numbers of the largest trained tensor: an adapter's, or the embeddings; `within` a layer, these apart."""
    sizes = shape.trained(work.lora, work.trainable).values()
    of_layers = [size for size in sizes if size != shape.vocabulary * shape.hidden]
    return max(of_layers if within and of_layers else sizes)


def optimiser(shape: Shape, work: Work) -> float:
    return work.optimizer * width(work) / FULL * trained(shape, work) / work.shards


def passing(shape: Shape, work: Work, rows: int, tokens: int, share: float, tapped: bool = False) -> list[dict[str, float]]:
    """The moments of a batch's passes that can be their peak: at the loss, and in the last layer's backward pass.

    With checkpointing nothing but the forward pass's end sees autocast's copies of all weights.

    Args:
        share: of a row's tokens, that have a label.
        tapped: with each output's changes along V, which the tap forms, and what it keeps for them.
    """
    n = rows * tokens
    kept = {"activations": activations(shape, work, n, tokens)}
    loss = {"logits": logits(shape, n * share)}
    layer = {"in a layer's backward pass": in_a_layer(shape, work, n, tokens)}
    layer["gradient of a tensor"] = float(width(work) * largest(shape, work, within=not shape.tied))
    copies = cast(shape, work)
    moments = [kept | copies | loss, kept | layer | ({} if work.checkpointing else copies)]
    if tapped:
        x = run_in(work)
        widened = FULL + HALF if x == HALF else 0  # what is multiplied, in float32, and as autocast has it; D = 2
        # as modules get them, where others are kept: norms', or those to be cast, whose copies only gradients need
        if not work.checkpointing and x == HALF and (work.norms or stream_in(work) == HALF):
            kept["inputs of modules"] = n * shape.layers * 2.0 * stream_in(work) * shape.hidden
        at_head = n * share * shape.vocabulary * (3 * x + 2 * widened)
        in_layer = n * shape.intermediate * (4 * x + 3 * widened)
        moments = [moment | kept for moment in moments]
        moments[1]["changes along V"] = float(in_layer)
        moments.append(kept | copies | {"changes of the logits along V": at_head})
    return moments


def training(shape: Shape, work: Work) -> Need:
    """A training step's peak, and the disk of a run: its checkpoints, and twice what a killed run goes on from.

    Gradients are made while a backward pass frees what its forward pass kept, so that a step's first micro-batch, that of
    its longest rows, does not see them whole; those after it do, and so does a process of several without shards, whose
    gradients lie in buckets that stay.
    """
    p = trained(shape, work)
    saved = p if work.lora else shape.parameters
    memory = held(shape, work)
    if work.lora:
        memory["adapters"] = float(FULL * p)
    if work.average:
        memory["average gradient"] = width(work) * p / work.shards
    memory["optimiser"] = optimiser(shape, work)
    if work.before and not (work.gpu or work.lora):
        memory["trained weights as they were"] = float(work.weight * p)
    rows = work.rows * (2 if work.retain and work.gradients == 1 else 1)  # two gradients are of two passes
    gradient = width(work) * p / work.shards
    moments: list[dict[str, float]] = [
        {"gradients": work.gradients * gradient} | added_up(shape, work, work.accumulated > 1 or work.buckets)
    ]
    passes = [(work.tokens, work.gradients if work.buckets else work.gradients - 1)]
    if work.accumulated > 1:
        passes.append((work.later or work.tokens, work.gradients))
    for tokens, whole in passes:
        for moment in passing(shape, work, rows, tokens, work.labels / work.tokens):
            if work.reference:
                moment["logits of the reference"] = logits(shape, work.rows * tokens * work.labels / work.tokens, 5)
            moments.append({"gradients": whole * gradient} | moment | not_reduced(shape, work, p))
    memory |= largest_of(moments)
    disk = {"checkpoints": float(work.checkpoints * work.saved * saved)}
    disk["to go on from"] = 2 * (FULL * saved + work.optimizer * p + width(work) * p * work.average)
    if work.lora and work.merged:
        disk["merged model"] = float(work.saved * shape.parameters)
    return Need("training", memory, disk, 1 if work.gpu else FRAGMENTS)


def largest_of(moments: list[dict[str, float]]) -> dict[str, float]:
    return max(moments, key=lambda moment: sum(moment.values()))


def added_up(shape: Shape, work: Work, again: bool) -> dict[str, float]:
    """At a backward pass's end, beside the gradients: of tied embeddings both uses' before they are added, and their sum.

    Args:
        again: there are gradients of an earlier pass to add to, so that what is added is no part of them; of one tensor.
    """
    embeddings = shape.vocabulary * shape.hidden
    if shape.tied and embeddings in shape.trained(work.lora, work.trainable).values():
        return {"gradients of the tied head": (3.0 if again else 2.0) * width(work) * embeddings}
    return {"gradient of a tensor": float(width(work) * largest(shape, work))} if again else {}


def not_reduced(shape: Shape, work: Work, p: int) -> dict[str, float]:
    """In shards, of two blocks, as they come and as they are reduced; few gradients are whole until the step's end."""
    if work.shards == 1:
        return {}
    held_here = work.weight * shape.parameters / work.shards
    if work.lora or (work.trainable is not None and FULL * p <= max(held_here, SPARE)):  # `few_are_trained`
        return {"gradients not yet reduced": float(FULL * p)}
    return {"gradients not yet reduced": 2.0 * (run_in(work) + FULL) * shape.parameters / (shape.layers + 1)}


def measuring(shape: Shape, work: Work, optimizer: bool) -> Need:
    """G-effects: V of two risks, the sum it is accumulated in (with norms the gradient's); the step's gradient is gone."""
    p = trained(shape, work)
    memory = held(shape, work)
    if optimizer:
        memory["optimiser"] = optimiser(shape, work)
    if not work.offload:
        memory["directions V"] = 2.0 * width(work) * p / work.shards
    passes = [(False, width(work) == HALF or work.offload), (work.tapped, work.norms or not work.tapped)]
    moments: list[dict[str, float]] = [added_up(shape, work, again=True)]
    for tapped, summed in passes:  # the risks' and the objective's
        sums = {"sum in float32": FULL * p / work.shards} if summed else {}
        found = passing(shape, work, MEASURED_ROWS, work.tokens, work.labels / work.tokens, tapped)
        moments += [sums | moment for moment in found]
    if work.ruled:
        found = passing(shape, work, MEASURED_ROWS, work.tokens, work.labels / work.tokens, tapped=False)
        moments += [{"two sums in float32": 2 * FULL * p / work.shards} | moment for moment in found]
    memory |= largest_of(moments)
    return Need("G-effects", memory, {}, 1 if work.gpu else FRAGMENTS)


def scoring(shape: Shape, work: Work, models: int, gradients: bool = False) -> Need:
    """Teacher forcing and decoding: weights (of several models for the control search), keys and values, logits.

    Args:
        gradients: of single rows, too.
    """
    memory = held(shape, work) | cast(shape, work)
    memory["weights"] *= models
    keys = 2 * shape.key_values * shape.layers * (HALF if work.bf16 else FULL)
    memory["keys and values"] = float(4 * MEASURED_ROWS * 2 * work.tokens * keys)  # four times the rows are decoded at once
    memory["logits"] = logits(shape, MEASURED_ROWS * work.labels)
    if gradients:  # nothing is decoded meanwhile
        batch = sum(memory.pop(name) for name in ("keys and values", "logits"))
        whole = float(width(work) * trained(shape, work))
        moments: list[dict[str, float]] = [{"gradients": whole} | moment for moment in passing(shape, work, 1, work.tokens, 1)]
        memory |= largest_of([{"keys and values, logits": batch}, *moments])
    return Need("scores", memory, {}, 1 if work.gpu else FRAGMENTS)


def asking(shape: Shape, work: Work, tokens: int = 1000) -> Need:
    """lm-eval's tasks: weights, and of each token of the prompts that are run at once its logits and log-probabilities."""
    memory = held(shape, work) | cast(shape, work) | {"logits": logits(shape, tokens, 2)}
    memory["a layer's activations"] = activations(shape, work, tokens, tokens) / shape.layers
    return Need(f"lm-eval, {tokens} tokens of prompts at once", memory, {}, 1 if work.gpu else FRAGMENTS)


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
