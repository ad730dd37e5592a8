"""EleutherAI's evaluation harness (the package `lm-eval`) on a model that is loaded: its tasks, its prompts, its metrics.

Nothing of the package, which is an optional one, is imported before it is asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator, PartialState
from transformers import PreTrainedTokenizerBase

from unlearn.passes.forcing import Pass
from unlearn.passes.sizes import ROWS


@dataclass(frozen=True)
class Asked:
    """What one name stands for: a task, or a group's or a tag's tasks.

    Attributes:
        items: what the library is given.
        tasks: the single tasks, with their data.
        manager: the library's index.
        digest: a hash of the tasks' configurations, questions and examples.
    """

    name: str
    items: Sequence[Any]
    tasks: Sequence[Any]
    manager: Any
    digest: str


def index(names: Sequence[str], folder: str | None) -> Any:
    """The library's `TaskManager`: of the folder's YAMLs alone where these have all the names, else of its own beside them."""
    from lm_eval.tasks import TaskManager

    with _told():
        if folder is not None:
            own = TaskManager(include_path=folder, include_defaults=False)
            if all(_within(own, name) for name in names):  # the library's thousands take seconds
                return own
        return TaskManager(include_path=folder)


def _within(manager: Any, name: Any) -> bool:
    """Whether the index has the task, or the group with all its tasks."""
    if name in manager.all_subtasks:
        return True
    return name in manager.all_groups and all(_within(manager, inner) for inner in manager.task_index[name].cfg["task"])


def load(name: str, manager: Any, fewshot: int | None = None) -> Asked:
    """A name's tasks with their data, from a hub or from files, as their YAMLs say."""
    with _told():
        loaded = manager.load([name])
        groups = loaded["groups"]
        items = [groups[name]] if name in groups else list(loaded["tasks"].values())
        tasks = list(loaded["tasks"].values())
        said = [[one.name, str(one.aggregate_metric_list)] for one in groups.values()]
        return Asked(name, items, tasks, manager, _hash([*said, *(_said(task, fewshot) for task in tasks)]))


def _said(task: Any, fewshot: int | None) -> list[Any]:
    """All that a task's questions are made of, wherever its files are."""
    config = dict(task.dump_config())
    own = config.get("num_fewshot") or 0
    shots = own if fewshot is None else fewshot
    metadata = {key: value for key, value in (config.get("metadata") or {}).items() if key != "config_source"}
    examples = (task.fewshot_docs() or []) if shots else []
    return [config | {"metadata": metadata, "dataset_kwargs": None}, list(task.eval_docs), list(examples)]


def _hash(said: Any) -> str:
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(said, default=str))  # where a function lies in memory
    return hashlib.sha256(text.encode()).hexdigest()


def language_model(how: Pass, tokenizer: PreTrainedTokenizerBase, share: bool = False) -> Any:
    """The library's `HFLM` of the pass's model, in its precision; on a GPU with batches that the library chooses.

    Args:
        share: requests are split over the processes.
    """
    from lm_eval.models.huggingface import HFLM

    on_cpu = how.model.device.type == "cpu"
    precision = {"mixed_precision_dtype": "bfloat16", "softmax_dtype": "float32"} if how.bf16 else {}
    lm = HFLM(pretrained=how.model, tokenizer=tokenizer, batch_size=how.batch_size or (ROWS if on_cpu else "auto"), **precision)
    if share:  # of a model that is loaded already, the library leaves this to its caller
        state = PartialState()
        lm.accelerator, lm._rank, lm._world_size = Accelerator(cpu=on_cpu), state.process_index, state.num_processes
    return lm


def evaluate(
    how: Pass,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    fewshot: int | None = None,
    limit: int | None = None,
    samples: bool = False,
) -> dict[str, Any] | None:
    """What `lm_eval.simple_evaluate` gives, without its text on the machine; None on all processes but the first.

    Args:
        fewshot: examples before a question; None, and for a task that fixes it at 0: the task's own.
        limit: questions of a task at most, the first ones.
        samples: also every question with the model's answers.
    """
    import lm_eval
    from lm_eval.utils import handle_non_serializable

    fewest = min(min(len(task.eval_docs), limit or sys.maxsize) for task in asked.tasks)
    share = 1 < PartialState().num_processes <= fewest  # with a question for each: the library would wait for ever
    with how.evaluating(), _told(), redirect_stdout(sys.stderr):
        found = lm_eval.simple_evaluate(
            model=language_model(how, tokenizer, share),
            tasks=list(asked.items),
            num_fewshot=fewshot,
            limit=limit,
            log_samples=samples,
            task_manager=asked.manager,
        )
    if found is None:
        return None
    plain: dict[str, Any] = json.loads(json.dumps(found, default=handle_non_serializable))
    return {key: value for key, value in plain.items() if key not in ("pretty_env_info", "git_hash", "upper_git_hash")}


def totals(name: str, found: Mapping[str, Any]) -> dict[str, float]:
    """The metrics as `<task>_<metric>` (and `_<filter>`, where it has one): of a group its own, else those of its tasks."""
    of_all = {task: _metrics(task, values) for task, values in found["results"].items()}
    return of_all.get(name) or {key: value for one in of_all.values() for key, value in one.items()}


def _metrics(task: str, values: Mapping[str, Any]) -> dict[str, float]:
    metrics = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            metrics["_".join([task, metric, *([chosen] if chosen != "none" else [])])] = value
    return metrics


class _Once(logging.Filter):
    """Each of the library's warnings once: it warns of every prompt that it cuts, and of being given a loaded model."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, int]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        place = (record.pathname, record.lineno)
        new = place not in self.seen and record.funcName not in ("__init__", "simple_evaluate")
        self.seen.add(place)
        return new


_HANDLER = logging.StreamHandler()
_HANDLER.addFilter(_Once())


@contextmanager
def _told() -> Iterator[None]:
    """With the library's warnings on the first process's standard error."""
    logger = logging.getLogger("lm_eval")
    before = logger.level, logger.propagate
    logger.propagate = False
    logger.setLevel(logging.WARNING if PartialState().is_main_process else logging.CRITICAL)
    logger.addHandler(_HANDLER)
    try:
        yield
    finally:
        logger.removeHandler(_HANDLER)
        logger.level, logger.propagate = before
