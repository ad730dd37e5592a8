"""Second answers that the model itself generates before unlearning (`method.second=generated`), kept, and read ever after."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.data import FILES, PLACE, Rows, UnlearningData, hash_text
from app.families import Family
from app.runs import SECOND, note_data, noted_data, run_of, saved_settings
from app.settings import Forget, GEffects, Method, Retain
from dataloader import second_rows
from unlearn.io.files import write_whole
from unlearn.io.rows import read_jsonl
from unlearn.io.weights import hash_file
from utils import is_main_process, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from unlearn.objectives.rows import Row
    from unlearn.passes import Pass

GENERATED = "generated"  # the column of the rows
HOW = ("alternatives", "temperature", "top_k", "ask")  # keys of a method's YAML
TRIES = 5  # at an answer that is not empty and not the true one
SAME = ("seed", "model_path", "split", "data_path", "loss_on_answer_tag", *FILES)  # a run's answers are for these settings


@dataclass(frozen=True)
class Speaker:
    """The model as it is before unlearning, and what puts questions to it."""

    how: Pass
    family: Family
    tokenizer: PreTrainedTokenizerBase
    tokenize: Callable[..., list[Row]]


def generates(method: Method, rows: Rows) -> bool:
    """Whether the method's second answers are to be generated: it says so, and no row has them.

    Raises:
        ValueError: its YAML does not say how, or a row has no question.
    """
    if method.second != GENERATED or any(GENERATED in row for row in rows):
        return False
    if lacking := [f"method.{key}" for key in HOW if method.get(key) is None]:
        raise ValueError(
            f"method.second={GENERATED}: the rows have no such column, and method={method.name} no {', '.join(lacking)};"
            " config/method/altpo.yaml has"
        )
    if "{question}" not in (ask := str(method.get("ask"))):
        raise ValueError(f"method.ask={ask}: needs {{question}} where the question is to stand, and may have {{answer}}")
    if without := [str(row.get(PLACE, row)) for row in rows if "question" not in row]:
        raise ValueError(f"method.second={GENERATED}: {without[0]}: has no question that could be answered otherwise")
    return True


def check_second(data: UnlearningData, settings: Forget) -> None:
    """Raises ValueError where a row lacks the second answers that are in the rows, before a model is loaded."""
    if settings.method.second is not None and not generates(settings.method, data.forget):
        second_rows(data.forget, settings.method.second, settings.seed)
    if settings.retain.second is not None and settings.retain.term:
        second_rows(data.retain, settings.retain.second, settings.seed, "retain.second")


def with_generated(rows: Rows, settings: Forget, folder: Path, speaker: Speaker) -> Rows:
    """A run's rows to forget, with the column that its method asks for: as the folder keeps it, else generated now."""
    if not generates(settings.method, rows):
        return rows
    file = folder / f"{SECOND}.jsonl"
    return _beside(rows, GENERATED, kept(file, rows, settings.method, settings.seed, speaker))


def of_measured(
    objectives: Sequence[tuple[Method, Retain]], rows: Rows, settings: GEffects, speaker: Speaker
) -> tuple[list[tuple[Method, Retain]], Rows]:
    """The objectives that are measured and the rows to forget, with a column for each way of generating answers.

    They are those of the run that is measured, where it has them of the same settings; else of the geffect folder.
    """
    found = []
    for method, retain in objectives:
        if generates(method, rows):
            file = _of_run(method, settings) or Path(
                str(settings.save_dir), "geffect", f"{SECOND}-{_digest(method, settings)}.jsonl"
            )
            column = file.stem
            if column not in rows[0]:
                answers = kept(file, rows, method, settings.seed, speaker)
                rows = _beside(rows, column, answers)
            method = method.model_copy(update={"second": column})
        found.append((method, retain))
    return found, rows


def _beside(rows: Rows, column: str, answers: list[list[str]]) -> Rows:
    return [row | {column: of} for row, of in zip(rows, answers, strict=True)]


def _of_run(method: Method, settings: GEffects) -> Path | None:
    """The file of the run that is measured, where its answers were generated as the method has it."""
    run = run_of(settings.model_path_cur)
    if run is None or noted_data(run, SECOND) is None:
        return None
    saved = saved_settings(run)
    same = all(saved.get(key) == getattr(settings, key) for key in SAME)
    return run / f"{SECOND}.jsonl" if same and all(saved["method"].get(key) == method.get(key) for key in HOW) else None


def _digest(method: Method, settings: GEffects) -> str:
    """What tells one way of generating answers from others, in a file's name."""
    return hash_text(json.dumps([settings.seed, *(method.get(key) for key in HOW)]))[:8]


def kept(file: Path, rows: Rows, method: Method, seed: int, speaker: Speaker) -> list[list[str]]:
    """Each row's answers, as the file has them; where it is not there they are generated, written whole, and noted.

    Raises:
        ValueError: the file is not what was noted of it, or not of these rows.
    """
    from accelerate import PartialState

    noted = noted_data(file.parent, file.stem)
    if noted is None or not file.exists():
        answers = generate(rows, method, seed, speaker)
        lines = [
            {"question": row["question"], "answer": row["answer"], GENERATED: of} for row, of in zip(rows, answers, strict=True)
        ]
        if is_main_process():
            write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))
        PartialState().wait_for_everyone()
    if noted not in (None, hash_file(file)):
        raise ValueError(f"{file}: its answers are not those that this began with; give save_dir=FOLDER")
    if noted is None:
        note_data(file.parent, file.stem, hash_file(file))
    there = read_jsonl(file)
    if [line.get("question") for line in there] != [row["question"] for row in rows]:
        raise ValueError(f"{file}: is of other rows; give save_dir=FOLDER")
    return [line[GENERATED] for line in there]


def generate(rows: Rows, method: Method, seed: int, speaker: Speaker) -> list[list[str]]:
    """Each row's answers, by the model as it is: `method.alternatives` of them, drawn independently of each other.

    One that is empty or the true answer is drawn again, `TRIES` times in all, and then left out; of a row that has no other
    the true one stays.

    Raises:
        ValueError: all that the model says of a row is empty.
    """
    import torch

    from unlearn.passes.decoding import sampled_answers

    asked = speaker.tokenize([row | {"question": _ask(method, row), "answer": ""} for row in rows], max_length=10**9)
    generator = torch.Generator().manual_seed(seed)
    several = int(method.get("alternatives"))
    said: list[list[str]] = [[""] * several for _ in rows]
    todo = [(i, k) for i in range(len(rows)) for k in range(several)]
    for _ in range(TRIES):
        prompts = [asked[i] for i, _ in todo]
        given = (method.get("temperature"), method.get("top_k"))
        texts = sampled_answers(speaker.how, prompts, speaker.tokenizer, generator, *given, what="second answers")
        for (i, k), text in zip(todo, texts, strict=True):
            said[i][k] = _cut(text, speaker.family) or said[i][k]
        todo = [(i, k) for i, k in todo if said[i][k] in ("", rows[i]["answer"].strip())]
        if not todo:
            break
    if todo:
        say(f"{len(todo)} of {several * len(rows)} second answers were empty or the true one, {TRIES} times each")
    return [_fit(of, row) for of, row in zip(said, rows, strict=True)]


def _ask(method: Method, row: dict[str, Any]) -> str:
    """The request for another answer, as the method words it."""
    parts = {"question": row["question"], "answer": row["answer"]}
    return re.sub(r"\{(question|answer)\}", lambda found: parts[found[1]], str(method.get("ask")))


def _cut(text: str, family: Family) -> str:
    """What the model said before it went on to a next question."""
    tag = family.question_start_tag.strip()
    return (text.partition(tag)[0] if tag and not family.chat_template else text).strip()


def _fit(answers: list[str], row: dict[str, Any]) -> list[str]:
    true = row["answer"].strip()
    found = [text for text in answers if text not in ("", true)] or [text for text in answers if text][:1]
    if not found:
        raise ValueError(f"{row.get(PLACE, row['question'])}: all second answers are empty; raise method.temperature or top_k")
    return found
