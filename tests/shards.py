"""What processes do together where some of them have empty shards, for test_processes.py.

torchrun --standalone --nproc_per_node=3 shards.py OUT
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import PartialState
from transformers import LlamaConfig, LlamaForCausalLM

from unlearn.adapters import LoRA, add_lora
from unlearn.loss import Loss
from unlearn.meter import Meter, Target, Wanted
from unlearn.objectives import ga
from unlearn.sharding import is_sharded, local, shard, whole_state

state = PartialState(cpu=True, timeout=timedelta(seconds=60))
ids = torch.tensor([1, 5, 6, 7, 2])
rows = [{"input_ids": ids, "labels": ids.clone().index_fill(0, torch.tensor([0, 1]), -100)}]
found = {}
for tied in (True, False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    add_lora(model, LoRA(r=1, alpha=2, dropout=0.0), 0, "base")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    want = {name: value.clone() for name, value in model.state_dict().items()}
    if state.num_processes > 1:
        shard(model)
        assert is_sharded(model)
    empty = sum(local(p).numel() == 0 for p in model.parameters())
    weights = whole_state(model)
    if state.is_main_process:
        assert weights.keys() == want.keys()
        assert all(torch.equal(weights[name], want[name]) for name in want)
    meter = Meter(model, Target(Loss(ga), rows), {"unlearn": rows, "retain": rows}, 0, Wanted(instances=False))
    found[str(tied)] = {"empty": empty, "geffect": meter.measure()["steps"]["geffect"].tolist()}
Path(sys.argv[1], f"{state.process_index}of{state.num_processes}.json").write_text(json.dumps(found))
if state.num_processes > 1:
    state.wait_for_everyone()
    state.destroy_process_group()
