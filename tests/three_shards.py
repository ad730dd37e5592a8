"""A tiny model in shards on processes of which some get none of a weight, for test_sharding.py; the main one prints JSON.

torchrun --nproc_per_node=3 three_shards.py
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM

import utils
from app.door import cli
from app.settings import Forget
from unlearn.models.adapters import LoRA, add_lora
from unlearn.models.sharding import all_finite, few_are_trained, local, shard, unreduced, whole, whole_state

utils.device()
state = PartialState()
config = AutoConfig.from_pretrained(Path(__file__).resolve().parents[1] / "config" / "tiny")
config.num_hidden_layers, config.vocab_size, config.tie_word_embeddings = 2, 50, True
torch.manual_seed(0)
whole_model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
add_lora(whole_model, LoRA(r=1, alpha=2, dropout=0.0), 0, "base")
with torch.no_grad():
    for name, p in whole_model.named_parameters():
        if "lora_B" in name:
            p.normal_()
ids = torch.randint(0, 50, (2, 9))


def loss(model: Any, rows: Any, bf16: bool = False) -> Any:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(input_ids=rows, use_cache=False).logits.float().logsumexp(-1).mean()


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


world: Any = dist.group.WORLD
found: dict[str, Any] = {"timeout": world._get_backend(torch.device("cpu")).options._timeout.total_seconds()}
model = copy.deepcopy(whole_model)
shard(model)
empty = torch.tensor(sum(local(p).numel() == 0 for p in model.parameters()))
dist.all_reduce(empty)
full = whole_state(model)
found |= {"empty": int(empty), "finite": all_finite(model.parameters())}
dist.all_reduce(kept := torch.tensor(len(full)))
if state.is_main_process:
    found |= {"same": same(full, whole_model.state_dict()), "kept": int(kept) == len(full)}
    found["tied"] = full["lm_head.weight"] is full["model.embed_tokens.weight"]

for row in ids:  # two micro-batches
    loss(whole_model, row[None]).backward()
found["few"] = few_are_trained(model)
with unreduced(model):
    loss(model, ids[:1]).backward()
found["unreduced"] = all(p.grad is None for p in model.parameters())
loss(model, ids[1:]).backward()
grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
expected = {name: p.grad for name, p in whole_model.named_parameters() if p.grad is not None}
found["gradients"] = grads.keys() == expected.keys()
found["off"] = max(float((grads[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected)

half = copy.deepcopy(whole_model)
half.zero_grad()
shard(half, bf16=True)
linear = next(m for m in half.modules() if isinstance(m, torch.nn.Linear))
seen: list[torch.dtype] = []
linear.register_forward_hook(lambda module, *_: seen.append(module.weight.dtype))
value = loss(half, ids, bf16=True)
value.backward()
found["run in"] = [str(dtype) for dtype in dict.fromkeys(seen)]
found["kept in"] = sorted(
    {str(p.dtype) for p in half.parameters()} | {str(p.grad.dtype) for p in half.parameters() if p.grad is not None}
)
found["bf16 off"] = abs(value.item() / loss(whole_model, ids).item() - 1)


def fail(cfg: Any) -> None:
    raise ValueError("on purpose")


sys.argv[1:] = ["model_family=tiny"]
try:
    cli(fail, Forget)
except SystemExit as stopped:
    found |= {"code": stopped.code, "ended": not dist.is_initialized()}
if state.is_main_process:
    print(json.dumps(found))
