"""Five steps of unlearning for several methods in one process (or under torchrun), for test_training.py.

torchrun --nproc_per_node=2 unlearn_five_steps.py MODEL OUT BATCH_SIZE ACCUMULATION METHOD...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import basher1
import forget
import utils

model, out, batch_size, accumulation, *methods = sys.argv[1:]
for method in methods:
    overrides = [
        *("model_family=tiny", f"model_path={model}", f"save_dir={out}/{method}", *basher1.parse_method(method)),
        *(f"batch_size={batch_size}", f"gradient_accumulation_steps={accumulation}", "num_epochs=1", "dtype=float32"),
    ]
    forget.run(utils.compose_config("forget", overrides))
