"""Models and tokenizers from and to folders that `from_pretrained` loads, each written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils import is_flash_attn_2_available, logging

from unlearn.io.files import remove_whole, written_whole
from unlearn.io.weights import TOKENIZER, base_of, fingerprint, lacks_tokenizer
from unlearn.models.adapters import has_adapters, merged, read_adapter
from unlearn.models.sharding import first_names, like

Weights = Mapping[str, Tensor]


def load_tokenizer(path: str, fallback: str) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, else the one at `fallback`. Raises ValueError where neither has one that loads."""
    if lacks_tokenizer(path) and lacks_tokenizer(fallback):
        raise ValueError(f"{path}: no tokenizer there, and none at {fallback}")
    place = fallback if lacks_tokenizer(path) else path
    with named(place, "tokenizer"):
        return AutoTokenizer.from_pretrained(place)


def same_tokens(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether the tokenizers of two checkpoints, each with its fallback, make the same tokens of texts.

    What one has beyond the other, such as a token to pad with, tells them apart in no text that both are for.
    """
    places = [fallback if lacks_tokenizer(path) else path for path, fallback in (one, other)]
    if places[0] == places[1] or _same_files(*map(Path, places)):
        return True
    first, second = load_tokenizer(*one), load_tokenizer(*other)
    ids, others = first.get_vocab(), second.get_vocab()
    probe = "Where was J. Doe-Smith born?\nIn Zürich, on 9/12/1954 (a Sunday)."
    return (
        all(others[token] == number for token, number in ids.items() if token in others)
        and first.eos_token_id == second.eos_token_id
        and first(probe)["input_ids"] == second(probe)["input_ids"]
    )


def _same_files(one: Path, other: Path) -> bool:
    return one.is_dir() and other.is_dir() and fingerprint(one, TOKENIZER) == fingerprint(other, TOKENIZER)


@contextmanager
def named(path: str, what: str) -> Iterator[None]:
    """Around reading a part of a checkpoint, in silence: what transformers raises names the checkpoint, as a ValueError."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # tokenizers raises it plain
        raise ValueError(f"{path}: its {what} does not load ({error!s:.300})") from error
    finally:
        logging.set_verbosity(level)


def load(
    path: str, fallback: str, device: torch.device, flash_attention: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The checkpoint's tokenizer (else the one at `fallback`) and model.

    Raises:
        ValueError: as `load_model`; or the tokenizer has tokens that the model does not embed.
    """
    model = load_model(path, device, flash_attention, dtype)
    tokenizer = load_tokenizer(path, fallback)
    special = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    tokens = 1 + max([tokenizer.vocab_size - 1, *(token for token in special if token is not None)])
    embedded = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if tokens > embedded:
        raise ValueError(f"{path}: its tokenizer has {tokens} tokens, and its model embeds {embedded}")
    return tokenizer, model


def load_model(
    path: str, device: torch.device, flash_attention: bool = False, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The checkpoint as a causal LM, with flash-attn where it is wanted and there (see `attention`); an adapter's is merged.

    Raises:
        ValueError: its files lack a weight, or have one of another shape than its config.json says, or one that is not finite.
    """
    if (base := base_of(path)) is not None:
        return merged(load_model(base, device, flash_attention, dtype), path)
    with named(path, "config.json"):
        config = AutoConfig.from_pretrained(path)
    how = "sdpa" if dtype == torch.float64 else attention(device, flash_attention)  # the plain one's softmax is float32
    how = _supported(how, config)
    # to a GPU weight by weight, not the whole by way of the CPU
    straight = {"device_map": {"": device}} if device.type == "cuda" else {}
    with named(path, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=how,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **straight,
        )
    model: PreTrainedModel = loaded[0]
    model.__dict__.pop("hf_device_map", None)  # of a model on one device; Trainer would compare it with its own name for it
    report: dict[str, Any] = loaded[1]
    if other := sorted(name for name, *_ in report["mismatched_keys"]):
        raise ValueError(f"{path}: its {', '.join(other[:3])} is of another shape than its config.json says")
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{path}: its files lack {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}")
    finite = torch.stack([weight.isfinite().all() for weight in model.parameters()]).tolist()  # where they are, asked once
    if broken := [name for (name, _), whole in zip(model.named_parameters(), finite, strict=True) if not whole]:
        raise ValueError(f"{path}: its weights are not finite: {', '.join(broken[:3])}{' and more' if len(broken) > 3 else ''}")
    return model.to(device)  # type: ignore[arg-type]


def load_weights(model: PreTrainedModel, path: str) -> None:
    """Put a checkpoint's weights into the model, in the model's precision; into its adapters, where it has some.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    if has_adapters(model):
        return read_adapter(model, Path(path))
    there = _there(model, path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(like(parameter, there[name]))  # no more than one weight twice


def read_weights(model: PreTrainedModel, path: str, keep: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor]:
    """A checkpoint's weights by name, as the model has them in type and place. Raises ValueError as `load_weights` does.

    Args:
        keep: what becomes of each, before the next one is put there.
    """
    there = _there(model, path)
    return {name: keep(like(parameter, there[name])) for name, parameter in model.named_parameters()}


def _there(model: PreTrainedModel, path: str) -> dict[str, nn.Parameter]:
    """A checkpoint's weights by name, on the CPU, in the model's precision. Raises ValueError as `load_weights` does."""
    kind = model.dtype if base_of(path) is None else torch.promote_types(model.dtype, torch.float32)  # adapters are added in it
    with no_bars():
        there = dict(load_model(path, torch.device("cpu"), dtype=kind).named_parameters())
    for name, parameter in model.named_parameters():
        shape = tuple(there[name].shape) if name in there else "nothing"
        if shape != tuple(parameter.shape):
            raise ValueError(f"{path}: another model ({name} is {shape} there, {tuple(parameter.shape)} in the original)")
    return there


@torch.no_grad()
def put_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Copy them into the model's parameters."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def attention(device: torch.device, flash: bool = False) -> str:
    """On a GPU flash-attn or SDPA; on a CPU, for rows as short as answers, plain matrix products are the fastest.

    Args:
        device: where the model is loaded to. A model that is to be split is loaded to the CPU, and runs on the process's.
    """
    runs_on = PartialState().device if device.type == "cpu" else device
    if runs_on.type == "cpu":
        return "eager"
    return "flash_attention_2" if flash and is_flash_attn_2_available() else "sdpa"


def _supported(attention: str, config: PreTrainedConfig) -> str:
    """The same, but for models that can't take SDPA (Gemma 2 caps its logits): the plain one."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "eager" if attention == "sdpa" and not getattr(model, "_supports_sdpa", True) else attention


def new_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of at most `size` tokens, trained on `texts`."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, size, special_tokens=["<pad>", "<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>")


def new_model(path: str, texts: list[str], seed: int, device: torch.device) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """A model of the config.json at `path` with random weights, and a byte-level BPE tokenizer trained on `texts`."""
    config = AutoConfig.from_pretrained(path)
    tokenizer = new_tokenizer(texts, config.get_text_config().vocab_size)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id, None
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=_supported(attention(device), config))
    return tokenizer, model.to(device)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' progress bars for files of a second each."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str, weights: Weights | None = None
) -> None:
    """What `from_pretrained` loads, weights in `dtype`; of a model with adapters, these alone.

    Args:
        weights: the model's state dict, where it is in shards.
    """
    kind, first = getattr(torch, dtype), first_names(model)
    cast: dict[str, Tensor] = {}  # on the CPU, one after the other: tied weights once
    for name, weight in (weights or model.state_dict()).items():
        once = first.get(name, name)
        cast[name] = cast[once] if once in cast else weight.to("cpu", kind)
    with no_bars():
        model.save_pretrained(folder, state_dict=cast)
    tokenizer.save_pretrained(folder)
    name_as_before(folder / "tokenizer_config.json")
    if has_adapters(model):  # a config.json would make it a whole model
        return
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")


def name_as_before(file: Path) -> None:
    """Have a saved tokenizer loaded by transformers 4, too: by the names that it has for these, and that 5 still reads."""
    config = json.loads(file.read_text()) if file.exists() else {}
    if config.get("tokenizer_class") != "TokenizersBackend":
        return
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := config.pop("extra_special_tokens", None), list):
        config["additional_special_tokens"] = extra
    elif extra is not None:
        config["extra_special_tokens"] = extra
    file.write_text(json.dumps(config, indent=2) + "\n")


def save_checkpoint(
    run: Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    keep_last: int | None,
    model: PreTrainedModel,
    weights: Weights,
    step: int,
) -> None:
    """The run's `checkpoint-<step>`, whole or absent; of those before it the newest stay, `keep_last` with it (None: all)."""
    with written_whole(run / f"checkpoint-{step}") as folder:
        save_model(model, tokenizer, folder, dtype, weights)
    there = [int(number) for folder in run.glob("checkpoint-*") if (number := folder.name[11:]).isdecimal()]
    for old in sorted(there)[:-keep_last] if keep_last else []:
        remove_whole(run / f"checkpoint-{old}")


def save_adapter(run: Path, tokenizer: PreTrainedTokenizerBase, dtype: str, model: PreTrainedModel, weights: Weights) -> None:
    """The model's adapters alone, whole or absent."""
    with written_whole(run / "adapter") as folder:
        save_model(model, tokenizer, folder, dtype, weights)


def base_on_disk(path: str, run: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Where the model that adapters are added to is loaded from: `path`, or where that is no whole model, `run/base`."""
    if (Path(path, "config.json").exists() and any(Path(path).glob("*.safetensors"))) or not Path(path).is_dir():
        return path
    base = run / "base"
    state = PartialState()
    if state.is_main_process and not base.exists():
        with written_whole(base) as beside:
            save_model(model, tokenizer, beside, str(model.dtype).removeprefix("torch."))
    state.wait_for_everyone()
    return str(base)


def save_into(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    weights: Weights | None = None,
) -> None:
    """The model in the run's folder itself, its config.json last: without it there is no checkpoint."""
    with written_whole(folder / "model") as beside:
        save_model(model, tokenizer, beside, dtype, weights)
    for file in sorted((folder / "model").iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(folder / file.name)
    (folder / "model").rmdir()
