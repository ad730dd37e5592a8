"""Each kind of work on a pretended GPU (see fake_device.py), for test_device.py: prints a line of JSON, {name: how it ended}.

python run_on_device.py [planted]; `planted`: with a tensor left on the CPU on purpose, which has to be noticed
"""

import copy
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from fake_device import GPU, OnGpu, Pretend
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, AutoModelForCausalLM

import utils
from dataloader import StepBatches
from unlearn.geffect import sharing, sites, tap
from unlearn.geffect.meter import Meter
from unlearn.geffect.target import Target, Wanted
from unlearn.models import checkpoints
from unlearn.objectives import functions as objectives
from unlearn.objectives import tokens
from unlearn.objectives.loss import Loss
from unlearn.passes import batches as sets
from unlearn.passes import decoding, forcing
from unlearn.passes.batches import on
from unlearn.training import trainer as training

torch.set_num_threads(1)
utils.device()
config = AutoConfig.from_pretrained(Path(__file__).resolve().parents[1] / "config" / "tiny")
config.pad_token_id, config.eos_token_id, config.bos_token_id, config.num_hidden_layers, config.vocab_size = 0, 1, None, 1, 200
generator = torch.Generator().manual_seed(0)
tiny = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def row(prompt: int, answer: int) -> dict[str, Any]:
    ids = torch.randint(2, 200, (prompt + answer,), generator=generator)
    labels = ids.clone()
    labels[:prompt] = -100
    return {"input_ids": ids, "labels": labels}


forget, retain = [row(3 + i % 2, 4 + i) for i in range(4)], [row(4, 5) for _ in range(4)]
shared = [*forget, *({key: torch.cat([x[key][:3], x[key][3:].flip(0)]) for key in x} for x in forget[:1])]
NOISE = GPU
npo = Loss(partial(objectives.npo, beta=0.1))


def model() -> Any:
    return copy.deepcopy(tiny).to(GPU)


def all_there(tensors: Iterable[Any]) -> None:
    assert all(isinstance(x, OnGpu) for x in tensors)


def train(loss: Callable[[Any], Loss], rows: list[Any], beside: Sequence[Any] = ()) -> None:
    trained: Any = model()
    minimised = loss(trained)
    batches = StepBatches(rows, list(beside), 1, 2, 2, 0, 0)
    training.freeze_unreached(trained, minimised, batches[0], bf16=False)
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad])
    for i in range(2):
        total: Any = sum(minimised(trained, on(batches[i], GPU)).values())
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
    all_there(trained.parameters())


def measure(wanted: Wanted, offload: bool = False, sweep: bool = False) -> None:
    nlls = forcing.token_nlls(forcing.Pass(model(), 0, 1), forget)
    rows = [row | {"ref_nll": nll} for row, nll in zip(forget, nlls, strict=True)]
    more: Any = {("ga", None): Target(Loss(objectives.ga), rows)} if sweep else {}
    found = Meter(model(), Target(npo, rows), {"unlearn": forget, "retain": retain}, 0, wanted, more, offload=offload)
    found.measure()
    found.start_update()
    found.update_effect()
    found.risk_values()
    where = {type(v) is OnGpu for v in found.directions.values()}
    assert where == {not offload}


def reference() -> Any:
    return copy.deepcopy(tiny).to(GPU).requires_grad_(False).eval()


def with_noise(_: Any) -> Loss:
    return Loss(partial(objectives.rmu, c=2.0), layer=1, noise=torch.rand(config.hidden_size).to(NOISE))


nll_rows = [row | {"ref_nll": torch.rand(int((row["labels"] != -100).sum()))} for row in forget]
WORK: dict[str, Callable[[], Any]] = {
    "finetune": lambda: train(lambda _: Loss(objectives.mean_nll), forget),
    "npo and kl": lambda: train(lambda _: Loss(npo.objective, objectives.kl, reference=reference()), nll_rows, retain),
    "rmu": lambda: train(with_noise, forget),
    "instances": lambda: measure(Wanted()),
    "positions": lambda: measure(Wanted(positions=True)),
    "plain": lambda: measure(Wanted(instances=False)),
    "tokens": lambda: measure(Wanted(instances=False, tokens=True)),
    "sweep": lambda: measure(Wanted(instances=False), sweep=True),
    "offload": lambda: measure(Wanted(norms=False), offload=True),
    "scores": lambda: forcing.teacher_force(forcing.Pass(model(), 0, 1), shared, moments=True),
    "scores of lone rows": lambda: forcing.teacher_force(forcing.Pass(model(), 0, 1), forget[:2], moments=True),
    "decoding": lambda: decoding.decode(forcing.Pass(model(), 0, 1), [x["input_ids"][:3] for x in forget], [3] * 4),
}
WORK["decoding without padding"] = lambda: without_padding()


def without_padding() -> None:
    with patch.object(decoding, "attends_alone", lambda _: False):
        WORK["decoding"]()


def saving() -> None:
    """The weights are cast on the CPU, tied ones once."""
    saved: dict[str, Any] = {}
    whole = model()
    whole.save_pretrained = lambda folder, state_dict: saved.update(state_dict)
    tokenizer: Any = SimpleNamespace(save_pretrained=lambda folder: None)
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text("{}")
        checkpoints.save_model(whole, tokenizer, Path(folder), "bfloat16")
    assert {(type(x), x.dtype) for x in saved.values()} == {(torch.Tensor, torch.bfloat16)}
    assert len({x.data_ptr() for x in saved.values()}) == len(list(whole.parameters()))


WORK["saving"] = saving


def on_cpu(owner: Any, name: str) -> Any:
    """A patch of a function: what it gives is left on the CPU."""
    function = getattr(owner, name)

    def leaving(*args: Any, **kwargs: Any) -> Any:
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, function(*args, **kwargs))

    return patch.object(owner, name, leaving)


# A tensor that is left on the CPU, for each kind of work.
PLANTED: dict[str, Callable[[], Any]] = {
    "finetune": lambda: on_cpu(training, "on"),
    "npo and kl": lambda: on_cpu(objectives, "reference_nll"),
    "rmu": lambda: patch.dict(globals(), NOISE=torch.device("cpu")),
    "instances": lambda: on_cpu(sites.Site, "along"),
    "positions": lambda: on_cpu(tap, "row_products"),
    "plain": lambda: on_cpu(sets, "on"),
    "tokens": lambda: on_cpu(sharing, "on"),
    "sweep": lambda: on_cpu(sharing, "contract"),
    "offload": lambda: on_cpu(sites.Site, "along"),
    "scores": lambda: on_cpu(forcing, "widen"),
    "scores of lone rows": lambda: on_cpu(tokens, "widen"),
    "decoding": lambda: on_cpu(decoding, "_pad_left"),
    "decoding without padding": lambda: on_cpu(tokens, "at_positions"),
}


def how_it_ends(name: str) -> str:
    try:
        with Pretend(), PLANTED[name]() if planted else nullcontext():
            WORK[name]()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


planted = sys.argv[1:] == ["planted"]
print(json.dumps({name: how_it_ends(name) for name in (PLANTED if planted else WORK)}))
