"""Every setting of every command, once: its type, range, default, meaning, and what it changes (see `app.fields`)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, Field

from app.benchmark import Benchmark
from app.fields import Count, NotNegative, Number, Positive, Settings, Share, Whole, setting


class Optimizer(NamedTuple):
    """How many bytes it keeps of each parameter, and the library that it is of, beside PyTorch's and transformers' own."""

    state: float
    library: str | None = None


OPTIMIZERS = {
    "adamw_torch_fused": Optimizer(8),
    "adamw_torch": Optimizer(8),
    "sgd": Optimizer(0),
    "adafactor": Optimizer(0),
    "adamw_8bit": Optimizer(2, "bitsandbytes"),
    "paged_adamw_32bit": Optimizer(8, "bitsandbytes"),
    "paged_adamw_8bit": Optimizer(2, "bitsandbytes"),
    "adamw_torch_8bit": Optimizer(2, "torchao"),
    "adamw_torch_4bit": Optimizer(1, "torchao"),
}
BYTES = {"float32": 4, "bfloat16": 2}

Half = Literal["float32", "bfloat16"]
Dtype = Literal["auto", "float32", "bfloat16"]
Wide = Literal["auto", "float32", "bfloat16", "float64"]
Length = Annotated[int, Field(ge=2)]
Names = Annotated[list[str], Field(min_length=1)]
Optim = Literal[
    "adamw_torch_fused",
    "adamw_torch",
    "sgd",
    "adafactor",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "adamw_torch_8bit",
    "adamw_torch_4bit",
]
TOKENS_PER_BATCH = setting(
    None,
    "of what is not a training step, padding counted: changes nothing but speed and memory; null: on a GPU what is free there,"
    " on a CPU by rows",
    named=False,
    may_differ=True,
)
ONLY = "a regular expression: only parameters in whose full names it is found are trained, with adapters of these"
ADAPTERS_LR = "with adapters ten times that"


# ---- groups ----


class Columns(Settings):
    """What the rows call their texts, where these are other names than the benchmark's YAML says."""

    question: str | None = setting(None, "null: the benchmark's, else question", named=False)
    answer: str | None = setting(None, "of a multiple choice the right one's number, from 0, or its text", named=False)
    choices: str | None = setting(None, "a list of texts: makes a row a multiple choice", named=False)
    text: str | None = setting(None, "of plain text, all of whose tokens carry loss", named=False)


class Adapters(Settings):
    r: Whole = setting(0, "rank of adapters in place of all weights (config/..._lora.yaml has 8); 0: none")
    alpha: Count = setting(32, "their scale is alpha / r")
    dropout: Annotated[int | float, Field(ge=0, lt=1)] = setting(0.05, "of their input, in training")


class InheritedAdapters(Settings):
    r: Whole = setting(None, "rank of the adapters that are measured; null: as the run has them")
    alpha: Count = setting(None, "their scale is alpha / r; null: the run's")
    dropout: Annotated[int | float, Field(ge=0, lt=1)] = setting(None, "null: the run's")


class WhileUnlearning(Settings):
    """G-effects measured while unlearning, into <run>/geffect: a 7B study needs no 13 checkpoints of 13 GB."""

    every: Whole = setting(0, "before every so many steps, from step 0 on, and after the last; 0: not at all", named=False)
    retain_rows: Count | None = setting(
        None, "of the loss's retain term, drawn once; null: as many as there are to forget", named=False
    )
    instances: bool = setting(True, "false: totals and layers only", named=False)
    norms: bool = setting(
        True, "with instances also the gradient's norm, and so the cosines: one more copy of the model", named=False
    )
    offload: bool = setting(False, "true: the risks' gradients V in CPU memory, each module's fetched when needed", named=False)
    monitor: bool = setting(
        False, "also every step's gradient and update along V of the last measurement, into monitor.csv", named=False
    )


class OfCheckpoints(Settings):
    offload: bool = setting(False, "true: the risks' gradients V in CPU memory, each module's fetched when needed", named=False)
    retain_rows: Count | None = setting(None, "of the loss's retain term, drawn once; null: as many as there are to forget")


class Scoring(Settings):
    """PS, memorisation and loss of the forget and the held-out retain rows while unlearning, into <run>/scores.csv."""

    every: Whole = setting(0, "before every so many steps, from step 0 on, and after the last; 0: not at all", named=False)


class Generation(Settings):
    max_length: Length | None = setting(200, "prompt and answer, in tokens; null: max_new_tokens alone counts")
    max_new_tokens: Count | None = setting(None, "of the answer")


class Open(Settings):
    """A group of config/method, config/retain or config/rule: its YAML has the defaults, of whatever keys it needs."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    by_file: ClassVar[bool] = True
    name: str

    def get(self, key: str, default: Any = None) -> Any:
        return (self.model_extra or {}).get(key, default)


class Method(Open):
    answers: Literal["forget", "idk"] = setting("forget", "whose answers carry the loss")
    second: str | None = setting(None, "the second answers, if needed: idk, a column of the rows, or generated by the model")
    refusal: str | None = setting(None, "a text, for an objective whose tokens answers are to become")
    negate: Positive | None = setting(None, "its checkpoints are the model before less so many times what training has added")
    objective: dict[str, Any]


class Retain(Open):
    weight: NotNegative = setting(1, "of the retain term")
    second: str | None = setting(None, "the second answers, for a term that needs them: idk, or a column of the rows")
    term: dict[str, Any] | None


class Rule(Open):
    combine: dict[str, Any]
    average: Share | None = setting(None, "of this step's g_r in its moving average, for a rule that has one")


Layers = Whole | Annotated[list[Whole], Field(min_length=1)] | None
OF_OPEN: dict[str, Any] = {"layer": Layers, "beta": Positive, "average": Share, "start": NotNegative, "eta": NotNegative}
OF_OPEN |= {
    "warmup": Share,
    "n": Whole,
    "alternatives": Count,
    "temperature": Positive,
    "top_k": Count,
    "tau": Positive,
    "beta1": NotNegative,
    "beta2": NotNegative,
    "divergence": Literal["tv", "kl", "js", "pearson"],
    "direction": Literal["forward", "reverse"],
}  # keys of open groups that have a range, by their last name


# ---- commands ----


class Common(Settings):
    """What every command that runs a model has."""

    config: ClassVar[str]

    model_family: str = setting(None, "an entry of model_config.yaml", named=False, inherited=True)
    hf_key: str | None = setting(
        None, "pretrained weights, a hub name or folder; null: the family's", named=False, inherited=True
    )
    data_path: str | None = setting(
        None,
        "a hub name or a local folder with the sets; null: the family's, else the benchmark's",
        named=False,
        inherited=True,
    )
    forget_data: str | None = setting(
        None, "a local file of rows, JSON or text, in place of the benchmark's sets", named=False, inherited=True
    )
    retain_data: str | None = setting(None, "the same, of the rows to keep", named=False, inherited=True)
    benchmark: Benchmark = setting(None, "the data's sets and what they are for: config/benchmark", named=False, inherited=True)
    columns: Columns = Columns()
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = setting(42, "what draws the rows, and what else is random")
    batch_size: Count | None = setting(None, "rows per process and forward pass")
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp", "fsdp: under torchrun weights, gradients and optimiser state in shards, one on each process", named=False
    )
    max_length: Length = setting(None, "tokens a row keeps at most; null: the benchmark's, 500 as a rule")
    loss_on_answer_tag: bool = setting(False, "true: the answer tag carries loss too, as in TOFU's own code")
    save_dir: str | None = setting(None, "the run's own folder; null: named after its settings", named=False, may_differ=True)
    deterministic: bool = setting(
        False, "true: the same bits each time on a GPU too, where PyTorch has such kernels (slower)", named=False
    )
    plan: Whole = setting(0, "N: print the memory and disk that this needs on N GPUs (processes), and do nothing", named=False)
    plan_for: Literal["gpu", "cpu"] | None = setting(None, "null: what is here", named=False)
    debug: bool = setting(False, "true: tracebacks", named=False, may_differ=True)
    output_dir: str = setting("icml", "where folders named after settings are", named=False, may_differ=True)


class Training(Common):
    """What both commands that train have."""

    batch_size: Count = setting(4, "rows per process and forward pass")
    dtype: Dtype = setting(
        "auto", "bfloat16: autocast over float32 master weights; auto: the family's, else bfloat16 where the device has it"
    )
    lr: Positive = setting(None, f"null: the family's finetune_lr or unlearn_lr, else 1e-5; {ADAPTERS_LR}", named=False)
    num_epochs: Positive = setting(5, "passes over the rows that are trained on", named=False)
    gradient_accumulation_steps: Count = setting(4, "micro-batches a step, on each process")
    merge: bool | None = setting(
        None,
        "true: a step's micro-batches in one, to rounding the same step; null: in as few as a GPU holds; false: as given",
        named=False,
    )
    trainable: str | None = setting(None, f"{ONLY}; null: all")
    weight_decay: NotNegative = setting(0.0, "of the optimiser", named=False)
    max_grad_norm: NotNegative = setting(0, "0: no clipping")
    optim: Optim = setting("adamw_torch_fused", "8bit: with bitsandbytes; torch_8bit, torch_4bit: with torchao")
    weights: Half = setting("float32", "bfloat16: master weights, gradients and optimiser state in half the memory")
    gradient_checkpointing: bool = setting(
        None, "recompute activations; null: the family's", named=False, may_differ=True, inherited=True
    )
    save_steps: Count | None = setting(
        None, "how often to save what a killed run goes on from; null: once an epoch", named=False, may_differ=True
    )
    save_dtype: Half = setting("float32", "of the saved weights", named=False)
    logger: Literal["tensorboard", "wandb", "trackio"] | None = setting(
        None, "beside logs/train.jsonl, where it is installed", named=False, may_differ=True
    )
    LoRA: Adapters = Adapters()


class Finetune(Training):
    config: ClassVar[str] = "finetune"

    split: str = setting(
        "full", "the rows to train on (with forget_data and retain_data: full is both, retain* the second)", named=False
    )
    num_epochs: Positive = setting(None, "null: the family's finetune_epochs, else 5", named=False)
    output_dir: str = setting("data/weight", "where folders named after settings are", named=False, may_differ=True)


class Forget(Training):
    config: ClassVar[str] = "forget"

    split: str = setting("forget10", "the rows to forget, a split of the benchmark's", named=False)
    model_path: str = setting(None, "a folder or hub name; null: the family's model fine-tuned on full", named=False)
    hyper_param: Number | None = setting(None, "the method's number (see config/method); null: its default", named=False)
    retain_holdout: Count | None = setting(
        None, "retain rows kept out of unlearning, the first ones; null: as the benchmark has it"
    )
    save_steps: Count = setting(5, "a checkpoint every so many steps", named=False, may_differ=True)
    keep_last: Count | None = setting(None, "how many of the newest checkpoints stay; null: all", named=False, may_differ=True)
    tokens_per_batch: Count | None = TOKENS_PER_BATCH
    geffect: WhileUnlearning = WhileUnlearning()
    eval: Scoring = Scoring()
    retain: Retain = setting(None, "config/retain", named=False)
    method: Method = setting(None, "config/method", named=False)
    rule: Rule = setting(None, "config/rule: the step from the objective's gradient and the retain term's", named=False)
    log_conflict: bool = setting(
        False, "true: rule=sum forms the two gradients apart too, to rounding the same step, and logs them", named=False
    )


class GEffects(Common):
    config: ClassVar[str] = "forget_ge"

    split: str = setting(None, "the rows to forget; null: the run's", inherited=True)
    model_path: str = setting(None, "the original model: step 0, and the reference; null: the run's", inherited=True)
    save_dir: str | None = setting(None, "where geffect/ goes; null: into the run", named=False, may_differ=True)
    model_path_cur: str | None = setting(
        None, "a checkpoint, or a run's folder for all of it; null: the original model alone", may_differ=True
    )
    step: Whole | None = setting(None, "of model_path_cur, where its folder is not called checkpoint-<step>", may_differ=True)
    hyper_param: Number | None = setting(None, "the method's number; null: the run's, else the method's default")
    retain_holdout: Count | None = setting(
        None, "how many of the held-out retain rows the retain risk is of; null: the run's", inherited=True
    )
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = setting(
        None, "what draws the \"I don't know\" answers, RMU's vector and the retain rows; null: the run's", inherited=True
    )
    max_length: Length = setting(None, "tokens a row keeps at most; null: the run's", inherited=True)
    loss_on_answer_tag: bool = setting(None, "null: the run's", inherited=True)
    batch_size: Count | None = setting(
        None, "rows at once at most, which changes nothing but speed and memory; null: 16 on a CPU", may_differ=True
    )
    tokens_per_batch: Count | None = TOKENS_PER_BATCH
    dtype: Wide = setting("auto", "bfloat16: autocast, as in training; auto: as in training")
    weights: Half = setting("float32", "bfloat16: the model, and V (summed in float32), in half the memory")
    parallel: Literal["ddp", "fsdp"] = setting("ddp", "fsdp: under torchrun weights and V in shards", may_differ=True)
    instances: bool = setting(True, "false: totals and layers only, by the plain way: least memory")
    norms: bool = setting(True, "with instances also the gradient's norm, and so the cosines: one more copy of the model")
    tokens: bool = setting(False, "true: also by label token", may_differ=True)
    positions: bool = setting(False, "true: also by position and layer, prompts included", may_differ=True)
    gradient_checkpointing: bool = setting(None, "recompute activations; null: the run's", may_differ=True, inherited=True)
    sweep: list[Any] | str | None = setting(
        None, "also the totals of other objectives, in one pass: [ga,wga:5,npo_kl:0.1,rmu_7:2]; all: every one", may_differ=True
    )
    sweep_norms: bool = setting(False, "also norm and cosines of each of a sweep: a backward pass for each", may_differ=True)
    trainable: str | None = setting(None, f"{ONLY}; null: the run's", inherited=True)
    geffect: OfCheckpoints = OfCheckpoints()
    LoRA: InheritedAdapters = InheritedAdapters()
    retain: Retain = setting(None, "config/retain; null: the run's")
    rule: Rule = setting(None, "config/rule, also the G-effects of its step; null: the run's")
    method: Method = setting(None, "config/method; null: the run's")


class Evaluation(Common):
    """What both evaluations have. What is not given (null, or empty) is as the checkpoint's run has it."""

    split: str = setting(None, "the forget split, with or without _perturbed; null: the run's", inherited=True)
    model_path: str = setting(None, "any model's folder, or a run's for all its checkpoints; needed", may_differ=True)
    original_path: str | None = setting(None, "the model before unlearning")
    retain_path: str | None = setting(None, "the model trained on the retain split only", may_differ=True)
    retain_holdout: Count | None = setting(None, "how many held-out retain rows; null: the run's", inherited=True)
    max_length: Length = setting(None, "tokens a row keeps at most; null: the run's, else the benchmark's", inherited=True)
    loss_on_answer_tag: bool = setting(None, "null: the run's", inherited=True)
    batch_size: Count | None = setting(
        None, "rows at once at most, which changes nothing but speed and memory; null: 16 on a CPU", may_differ=True
    )
    tokens_per_batch: Count | None = TOKENS_PER_BATCH
    dtype: Wide = setting("auto", "bfloat16: autocast; auto: the family's, else bfloat16 where the device has it")
    parallel: Literal["ddp", "fsdp"] = setting("ddp", "fsdp: under torchrun weights in shards", may_differ=True)
    save_dir: str | None = setting(None, "null: below model_path; else there, and nothing into the run's", may_differ=True)


class EvalTofu(Evaluation):
    config: ClassVar[str] = "eval_tofu"

    original_path: str | None = setting(
        None, "the model before unlearning (step 0 of a run's folder); null: what the run started from", may_differ=True
    )
    retain_result: str | None = setting(
        None, "the retain model's eval_log_aggregated.json, for Forget Quality (or retain_path)", may_differ=True
    )
    truth_ratio: Literal["geometric", "arithmetic"] = setting(
        "geometric", "as TOFU's leaderboard; arithmetic: as its paper", may_differ=True
    )
    rouge_tokenizer: Literal["ascii", "unicode"] = setting(
        "ascii", "ROUGE's words: a-z and 0-9, as rouge-score is published; unicode: of any script"
    )
    epsilon: NotNegative = setting(
        0, "added to the denominators of probabilities and truth ratios; 1e-10: as open-unlearning", may_differ=True
    )
    paraphrased: bool = setting(False, "true: also probability and ROUGE after the paraphrased questions, where rows have them")
    ds_size: Count | None = setting(300, "rows of each set at most; null: all")
    method_name: str | None = setting(None, "in aggregate_stat.csv; null: the run's folder", may_differ=True)
    submitted_by: str | None = setting(None, "in aggregate_stat.csv", may_differ=True)
    generation: Generation = Generation()


class EvalEverything(Evaluation):
    config: ClassVar[str] = "eval_everything"

    original_path: str = setting(
        None, "the model before unlearning; null: what the run started from, else the family's fine-tuned one"
    )
    ps_p: Share = setting(0.9, "the bar: this times the original model's retain PS", may_differ=True)
    similar: bool = setting(False, "true: also PS similar, by real generation", may_differ=True)
    representation: bool = setting(False, "true: also CKA and cosine of every layer's outputs", may_differ=True)
    lm_eval: Names | None = setting(None, "also tasks and groups of the package lm-eval: [mmlu,wmdp_bio]", may_differ=True)
    lm_eval_tasks: str | None = setting(None, "a folder with tasks of one's own, lm-eval's YAML files", may_differ=True)
    lm_eval_fewshot: Whole | None = setting(None, "examples before a question; null: as the task has it", may_differ=True)
    lm_eval_limit: Count | None = setting(None, "questions of a task at most, the first ones; null: all", may_differ=True)
    control: bool = setting(True, "search the mixing weight at which the retain PS reaches the bar", may_differ=True)
    gradnorm: bool = setting(
        False, "true: also the membership score gradnorm, a backward pass a forget and a holdout row", may_differ=True
    )
    min_k: Annotated[int | float, Field(gt=0, le=1)] = setting(0.4, "the share of tokens that min-k and min-k++ look at")
    ds_size: Count | None = setting(300, "in the folder's name; PS and the others are of all rows")


class Aggregate(Settings):
    """TOFU's scores of a log in its format, with no model."""

    config: ClassVar[str] = "aggregate_eval_stat"

    ckpt_result: str = setting(None, "an eval_log_aggregated.json; needed")
    retain_result: str | None = setting(None, "the retain model's, for Forget Quality")
    save_file: str = setting(None, "the CSV to write; needed")
    method_name: str | None = setting(None, "null: the log's name")
    submitted_by: str | None = setting(None, "in the CSV")
    truth_ratio: Literal["geometric", "arithmetic"] = setting("geometric", "as TOFU's leaderboard; arithmetic: as its paper")
    epsilon: NotNegative = setting(0, "added to denominators; 1e-10: as open-unlearning")
    debug: bool = setting(False, "true: tracebacks")


COMMANDS: dict[str, type[Settings]] = {
    group.config: group for group in (Finetune, Forget, GEffects, EvalTofu, EvalEverything, Aggregate)
}
