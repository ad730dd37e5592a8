"""What the process imports that the tests' commands are forked from: all that a command may, and the project itself."""

from __future__ import annotations

import gc
import importlib
import pkgutil
import tempfile
from pathlib import Path

LIBRARIES = (
    *("torch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint.state_dict"),
    *("transformers.trainer", "transformers.data.data_collator", "transformers.models.llama.modeling_llama"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "peft", "datasets"),
    *(
        "matplotlib.pyplot",
        "matplotlib.backends.backend_pdf",
        "pandas",
        "pandas.io.formats.csvs",
        "pandas.core.reshape.reshape",
    ),
    *("pyarrow.parquet", "scipy.stats", "rouge_score.rouge_scorer", "tensorboard", "torch.utils.tensorboard"),
    *("hydra", "hydra._internal.hydra", "pydantic", "dataloader"),
)
for name in LIBRARIES:
    importlib.import_module(name)
for package in ("app", "unlearn"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        importlib.import_module(module.name)

from app.compose import given  # noqa: E402
from app.families import load_families  # noqa: E402
from unlearn.reporting.style import STYLE, SYMBOLS, mpl, new_figure, save  # noqa: E402

for command in ("finetune", "forget", "forget_ge", "eval_tofu", "eval_everything"):
    given(command, ["model_family=tiny"])  # so that the parsers of settings have their tables
for words in ("method=npo retain=kl", "method=wga retain=gd", "method=idk"):
    given("forget", words.split())
load_families()
with mpl.rc_context(STYLE), tempfile.TemporaryDirectory() as drawn:
    figure = new_figure(1)
    figure.subplots().set_title(SYMBOLS["retain"])  # with the fonts, and what reads mathematics
    save(figure, Path(drawn, "figure"))
gc.collect()
gc.freeze()  # so that a command's collections don't go through all of this
