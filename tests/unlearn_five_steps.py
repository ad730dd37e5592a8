"""Five steps of unlearning for several methods in one process (or under torchrun), for test_training.py.

torchrun --nproc_per_node=2 unlearn_five_steps.py MODEL OUT BATCH_SIZE ACCUMULATION PARALLEL METHOD..., `finetune` being one,
and METHOD+rule:gru one with a setting of its own
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import basher1
import finetune
import forget
from app.compose import given

model, out, batch_size, accumulation, parallel, *words = sys.argv[1:]
methods, more = ([word for word in words if ("=" in word) == setting] for setting in (False, True))
for method in methods:
    how = [
        f"batch_size={batch_size}",
        f"gradient_accumulation_steps={accumulation}",
        f"parallel={parallel}",
        "dtype=float32",
        *more,
    ]
    if method == "finetune":
        own = ["model_family=smollm2-135m", "data_path=data/sample", f"hf_key={model}", "num_epochs=0.1", "lr=1e-3"]
        finetune.run(given("finetune", [*own, f"save_dir={out}/finetune/checkpoint-5", *how]))
        continue
    name, *own = method.split("+")
    overrides = [
        *("model_family=tiny", f"model_path={model}", f"save_dir={out}/{method}", *basher1.parse_method(name)),
        *(word.replace(":", "=") for word in own),
        *("num_epochs=1", "retain_holdout=4", *how),
    ]
    forget.run(given("forget", overrides))
