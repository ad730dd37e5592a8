"""One step of unlearning in shards, counting what is reduced over the processes, for test_processes.py.

torchrun --standalone --nproc_per_node=2 count_reductions.py MODEL OUT BATCH_SIZE ACCUMULATION
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import forget
import utils

model, out, batch_size, accumulation = sys.argv[1:]
reductions = 0


def counted(name: str) -> None:
    collective = getattr(torch.distributed, name, None)

    def count(*args: Any, **kwargs: Any) -> Any:
        global reductions
        reductions += 1
        return collective(*args, **kwargs)  # type: ignore[misc]

    if collective is not None:
        setattr(torch.distributed, name, count)


for name in ("reduce_scatter_tensor", "reduce_scatter_single"):  # FSDP2's, before PyTorch 2.13 and since
    counted(name)
overrides = ["model_family=tiny", f"model_path={model}", f"save_dir={out}/run", "method=ga", "split=forget05", "num_epochs=1"]
overrides += [f"batch_size={batch_size}", f"gradient_accumulation_steps={accumulation}", "parallel=fsdp", "dtype=float32"]
forget.run(utils.compose_config("forget", overrides))
if utils.is_main_process():
    Path(out, "reductions").write_text(str(reductions))
utils.end_processes()
