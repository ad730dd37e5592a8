"""What a G-effect measurement is of: its steps, its objectives, its rows, and the meter that they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.checks import check_gradient, check_layer, check_rule
from app.compose import compose
from app.data import UnlearningData, data_of, unlearning_data
from app.families import Family
from app.methods import choices, layer_of, parse_method
from app.runs import run_of, saved_settings
from app.settings import Forget, GEffects, Method, Retain
from unlearn.io.rows import read_jsonl, read_object, write_json
from unlearn.io.weights import is_of, run_checkpoints, step_of, weights_of
from utils import is_main_process, model_device, use_bfloat16

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from unlearn.geffect import GEffectCallback, Meter, Target
    from unlearn.objectives.rows import Row
    from unlearn.passes import Pass

Steps = list[tuple[int, str]]
Objectives = dict[tuple[str, float | None], tuple[Method, Retain]]


def find_steps(settings: GEffects) -> tuple[Steps, Steps]:
    """The steps to measure, and the one that comes after the last of them, if there is one.

    Raises:
        ValueError: model_path_cur is no checkpoint nor a run's folder, or its step is not known.
    """
    if settings.model_path_cur is None:
        return [(0, settings.model_path)], []
    here = Path(settings.model_path_cur)
    if inside := run_checkpoints(here):
        return [(0, settings.model_path), *((step, str(path)) for step, path in inside)], []
    step = step_of(here) if settings.step is None else settings.step
    if step is None:
        raise ValueError(f"model_path_cur={here}: its folder is not called checkpoint-<step>; give step=N")
    later = [(s, str(path)) for s, path in run_checkpoints(here.parent) if s > step and step_of(here) is not None]
    return [(step, str(here))], later[:1]


def parse_sweep(settings: GEffects, tell: Callable[[str], None] = lambda _: None) -> Objectives:
    """The objectives of `sweep=[METHOD:HYPER,...]` by method and hyper-parameter, each as its YAML has it; `all`: every one.

    Args:
        tell: gets a line for each that `all` leaves out.

    Raises:
        ValueError: an entry is no method, or what stands behind its colon no number.
    """
    found: Objectives = {}
    for entry in entries(settings):
        name, colon, number = str(entry).partition(":")
        if name == "all" and not colon:
            found |= every_objective(settings, tell)
            continue
        try:
            hyper = float(number) if colon else None
        except ValueError:
            raise ValueError(f"sweep={entry}: {number!r} is no number; entries are METHOD or METHOD:HYPER, or all") from None
        found[name, hyper] = method, retain = _composed(name, hyper)
        check_gradient(method, "sweep", "leave it out")
        check_layer(settings.model_path, layer_of(method, retain))
    return found


def entries(settings: GEffects) -> list[Any]:
    """`sweep=all` is `sweep=[all]`."""
    return [settings.sweep] if isinstance(settings.sweep, str) else list(settings.sweep or [])


@cache
def _composed(name: str, hyper: float | None) -> tuple[Method, Retain]:
    one = compose("forget", [*parse_method(name), *([] if hyper is None else [f"hyper_param={hyper:g}"])])
    return Method.model_validate(one["method"]), Retain.model_validate(one["retain"])


def every_objective(settings: GEffects, tell: Callable[[str], None]) -> Objectives:
    """Each of config/method at its default that has a gradient at the unlearned weights, a layer and all answers here."""
    found: Objectives = {}
    data = unlearning_data(data_of(settings), settings.split, settings.retain_holdout)
    for name in choices("method"):
        method, retain = _composed(name, None)
        try:
            check_gradient(method, "method", "only its weights can be measured")
            check_layer(settings.model_path, layer_of(method, retain))
            check_answers(data, method, retain)
        except ValueError as error:
            tell(f"sweep=all: without {name}: {error}")
        else:
            found[name, None] = method, retain
    return found


def check_answers(data: UnlearningData, method: Method, retain: Retain) -> None:
    """Raises ValueError where rows do not have what other answers to their questions are made of."""
    for rows, of in ((data.forget, {method.answers, method.second}), (data.retain, {retain.second})):
        columns = ["question" if source == "idk" else source for source in of if source not in (None, "forget")]
        if lacking := [column for column in columns if any(not row.get(column) for row in rows)]:
            raise ValueError(f"its second answers are of a column that rows lack: {lacking[0]}")


def check_wanted(settings: GEffects) -> None:
    """Raises ValueError where what is asked for can't go together."""
    if settings.dtype == "float64" and settings.weights != "float32":
        raise ValueError(f"weights={settings.weights}: dtype=float64 has its weights in float64")
    if settings.rule.name != "sum":
        check_rule(settings)
    if settings.positions and not settings.instances:
        raise ValueError("positions=true: by position only with instances=true")
    if settings.parallel == "fsdp" and (settings.tokens or settings.sweep):
        key = f"tokens={settings.tokens}" if settings.tokens else f"sweep={entries(settings)}"
        raise ValueError(f"{key}: needs whole weights on every process; parallel=ddp has them, parallel=fsdp has not")
    if settings.parallel == "fsdp" and settings.instances and not settings.norms:
        raise ValueError("norms=False: parallel=fsdp forms the gradient anyway; norms=true, or instances=false")


def check_weights(folder: Path, steps: Steps, following: Steps) -> None:
    """Note which weights each step is of. Raises ValueError where the tables of one of `steps` are of others."""
    file = folder / "weights.json"
    noted = read_object(file) if file.exists() else {}
    if other := [str(step) for step, path in steps if not is_of(path, noted.get(str(step)))]:
        raise ValueError(
            f"{folder} has the G-effects of other weights at step {', '.join(other)}; remove it, or give save_dir=FOLDER"
        )
    if is_main_process():
        new = {str(step): weights_of(path) for step, path in [*steps, *following] if str(step) not in noted}
        write_json(file, noted | new)


def build_meter(settings: GEffects, family: Family) -> Meter:
    """The meter of the settings' objective and of their sweep's, on the original model."""
    import torch

    from app.building import adapt, build_loss, compares, reference_of, split_up, tokenizing
    from app.second import Speaker, of_measured
    from dataloader import beside_rows
    from unlearn.geffect import Meter, Target, Wanted
    from unlearn.geffect.parts import RISKS
    from unlearn.models import load, pad_id
    from unlearn.models.evaluating import enable_gradient_checkpointing
    from unlearn.passes import Pass

    data = unlearning_data(data_of(settings), settings.split, settings.retain_holdout)
    training = unlearning_data(data_of(settings), settings.split, held_out_by_run(settings))
    if len(data.held_out) > len(training.held_out):
        raise ValueError(f"retain_holdout={settings.retain_holdout}: the run held out {len(training.held_out)} rows only")
    bf16 = settings.dtype not in ("float64", "float32") and use_bfloat16(settings.dtype, family.dtype)
    kind = torch.float64 if settings.dtype == "float64" else getattr(torch, settings.weights)
    tokenizer, model = load(settings.model_path, family.hf_key, model_device(settings.parallel), dtype=kind)
    adapt(model, settings, settings.model_path)
    sweep = parse_sweep(settings)
    objectives = [(settings.method, settings.retain), *sweep.values()]
    reference = reference_of(model) if any(compares(*one) for one in objectives) else None
    split_up(settings, bf16, model, reference)
    tokenize, pad = tokenizing(settings, family, tokenizer, model), pad_id(tokenizer)
    risks = dict(zip(RISKS, (tokenize(data.forget), tokenize(data.held_out)), strict=True))
    how = Pass(model, pad, tokenizer.eos_token_id, bf16, settings.batch_size, settings.tokens_per_batch)
    beside = beside_rows(range(len(training.retain)), settings.geffect.retain_rows, len(data.forget), settings.seed)
    objectives, forget = of_measured(objectives, data.forget, settings, Speaker(how, family, tokenizer, tokenize))
    rows = Measured(objectives, forget, training.retain, beside, tokenize, how, settings.seed)
    rows.lists["forget", None] = risks["unlearn"]
    targets = [
        Target(build_loss(method, retain, settings.seed, model, reference, tokenizer), rows.of(method), rows.of(retain))
        for method, retain in objectives
    ]
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return Meter(
        model=model,
        target=targets[0],
        risks=risks,
        pad=pad,
        wanted=Wanted(settings.instances, settings.norms, settings.positions, settings.tokens, settings.sweep_norms),
        sweep=dict(zip(sweep, targets[1:], strict=True)),
        bf16=bf16,
        batch_size=settings.batch_size,
        tokens_per_batch=settings.tokens_per_batch,
        offload=settings.geffect.offload,
        rule=combined(settings),
        decode=lambda token: str(tokenizer.decode([token])),
    )


class Measured:
    """The rows that losses are of, tokenised and run through the model before unlearning once for all losses of their kind.

    Args:
        groups: the methods and retain terms that are measured.
        forget: the texts to forget.
        retain: those that are retained in training.
        beside: which of these are measured.
    """

    def __init__(
        self,
        groups: Iterable[tuple[Method, Retain]],
        forget: list[dict[str, Any]],
        retain: list[dict[str, Any]],
        beside: Sequence[int],
        tokenize: Callable[..., list[Row]],
        how: Pass,
        seed: int,
    ) -> None:
        self.groups = [group for pair in groups for group in pair]
        self.forget_texts, self.retain_texts, self.beside = forget, retain, beside
        self.tokenize, self.how, self.seed = tokenize, how, seed
        self.lists: dict[tuple[str, str | None], list[Row]] = {}

    def of(self, group: Method | Retain) -> list[Row]:
        """With second answers and log-probabilities before unlearning where it needs them; none where it is no term."""
        from app.building import needs, with_reference, with_second
        from unlearn.objectives.rows import seconds

        if isinstance(group, Retain) and group.term is None:
            return []
        kind = kind_of(group)
        base = self._answered(kind)
        for other in self.groups:  # once for all of this kind that compare
            base = with_reference(base, other, self.how) if kind_of(other) == kind and "ref_nll" not in base[0] else base
        self.lists[kind, None] = base
        if "second" not in needs(group):
            return base
        if (kind, group.second) not in self.lists:
            forget = kind != "retain"
            texts, chosen = (self.forget_texts, None) if forget else (self.retain_texts, self.beside)
            self.lists[kind, group.second] = with_second(base, texts, group, self.seed, self.tokenize, chosen)
        found = self.lists[kind, group.second]
        if "ref_nll" in needs(group) and "ref_nll" not in seconds(found[0])[0]:
            found = self.lists[kind, group.second] = with_reference(found, group, self.how)
        return found

    def _answered(self, kind: str) -> list[Row]:
        from dataloader import idk_rows

        if (kind, None) not in self.lists:
            texts = self.forget_texts if kind != "retain" else [self.retain_texts[i] for i in self.beside]
            self.lists[kind, None] = self.tokenize(idk_rows(texts, self.seed) if kind == "idk" else texts)
        return self.lists[kind, None]


def kind_of(group: Method | Retain) -> str:
    """Whose rows and answers its loss is of: `forget`, `idk` or `retain`."""
    return group.answers if isinstance(group, Method) else "retain"


def while_unlearning(
    settings: Forget, how: Pass, target: Target, rows: Mapping[str, list[Row]], folder: Path
) -> GEffectCallback:
    """What measures G-effects in a run's training, into the run's `geffect/`.

    Args:
        how: the trained model and how it is run, its budget shared.
        rows: tokenised, `forget` and held-out `retain`: of the risks.
    """
    from unlearn.geffect import GEffectCallback, Meter, Wanted
    from unlearn.geffect.parts import RISKS

    wanted, rule = settings.geffect, combined(settings)
    risks = dict(zip(RISKS, (rows["forget"], rows["retain"]), strict=True))
    parts = Wanted(instances=wanted.instances, norms=wanted.norms)
    meter = Meter(how.model, target, risks, how.pad, parts, bf16=how.bf16, offload=wanted.offload, rule=rule)
    meter.budget = how.budget
    return GEffectCallback(meter, wanted.every, folder / "geffect", wanted.monitor)


def combined(settings: Forget | GEffects) -> Any:
    """What a gradient rule makes of two gradients; None of the sum, whose G-effects are the loss's."""
    from app.building import rule_of

    rule = None if settings.rule.name == "sum" else rule_of(settings)
    return None if rule is None else rule.combine


def held_out_by_run(settings: GEffects) -> int | None:
    """As many retain rows as the run itself held out: the others it was trained on."""
    run = run_of(settings.model_path_cur)
    return settings.retain_holdout if run is None else saved_settings(run)["retain_holdout"]


def order_of(settings: GEffects) -> list[int]:
    """The steps of the run that is measured, as far as its checkpoints are there, 0 first."""
    folders = [] if settings.model_path_cur is None else [Path(settings.model_path_cur), Path(settings.model_path_cur).parent]
    there = next((found for folder in folders if (found := run_checkpoints(folder))), [])
    return [0, *(step for step, _ in there)]


def learning_rates(run: Path | None) -> dict[int, float]:
    """Each training step's, from the run's log."""
    return logged(run, "learning_rate")


def logged_duals(run: Path | None) -> dict[int, float]:
    """The dual variable after each training step, from the run's log; none where its method has none."""
    return logged(run, "dual", always=False)


def logged(run: Path | None, column: str, always: bool = True) -> dict[int, float]:
    """A column of a run's log by step. Raises ValueError where a line lacks it that all have `always`."""
    file = None if run is None else run / "logs" / "train.jsonl"
    if file is None or not file.exists() or not file.stat().st_size:
        return {}
    try:
        return {line["step"]: line[column] for line in read_jsonl(file) if always or column in line}
    except KeyError as error:
        raise ValueError(f"{file}: a line lacks {error}") from error


def at_step(meter: Meter, step: int, duals: Mapping[int, float]) -> None:
    """Give the measured loss the dual variable that the run had at that step; at step 0 it is at its start."""
    dual = meter.target.loss.dual
    if dual is None or not duals or step == 0:
        return
    if step not in duals:
        raise ValueError(f"step {step}: the run's log has no dual variable of that step")
    dual.value = duals[step]
