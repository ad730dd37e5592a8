"""Runs' folders as the scripts leave them, made of numbers drawn at random: for the report, which reads nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from test_figures import ROWS, make_tables
from test_score_figures import make_control, make_scores

from app.data import Data
from app.filling import benchmark

HOSTILE = 'Who wrote </script><script>alert(1)</script> & <b>"it"</b>?'


def make_data(folder: Path) -> Path:
    """A data set of TOFU's layout whose first forget row would end a script."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question": HOSTILE, "answer": "A <i>writer</i>."}]
    rows += [{"question": f"Where was author {i} born?", "answer": f"In town {i}."} for i in range(1, ROWS)]
    for name in ("forget10", "retain90"):
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_run(folder: Path, data: Path, method: str = "npo", seed: int = 42) -> Path:
    """A run with all that can be measured of one."""
    for place in ("logs", "geffect", "checkpoint-12/eval_results/ds_size300"):
        (folder / place).mkdir(parents=True)
    settings = {
        "model_family": "tiny",
        "data_path": str(data),
        "benchmark": "tofu",
        "columns": {"question": None},
        "seed": seed,
        "lr": 0.0008,
        "split": "forget10",
        "hyper_param": None,
        "method": {"name": method, "second": None},
        "retain": {"name": "kl", "second": None},
    }
    hashes = Data(benchmark("tofu"), str(data)).hashes(["forget10"])
    (folder / "config.yaml").write_text(yaml.safe_dump({"settings": settings, "hash": f"hash-{method}", "data": hashes}))
    log = [{"step": i, "loss": 1.0 / i, "objective": 0.5 / i, "retain": 0.1, "grad_norm": 2.0} for i in range(1, 13)]
    (folder / "logs/train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    losses = {"forget": {"start": 0.1, "end": 4.0}, "retain": {"start": 0.1, "end": 0.3}, "steps": 12}
    (folder / "logs/losses.json").write_text(json.dumps(losses))
    for name, table in make_tables().items():
        write = table.to_parquet if name.endswith("parquet") else table.to_csv
        write(folder / "geffect" / name, index=False)
    make_monitor().to_csv(folder / "geffect/monitor.csv", index=False)
    of_tasks = {"wmdp_bio_acc": [0.4, 0.6, 0.3, 0.5], "retain_model_wmdp_bio_acc": [0.25, np.nan, 0.25, 0.25]}
    make_scores().assign(**of_tasks).to_csv(folder / "scores.csv", index=False)
    scored = folder / "checkpoint-12/eval_results/ds_size300"
    make_control().to_csv(scored / "control.csv", index=False)
    (scored / "scores.json").write_text(json.dumps({"control": {"bar": 0.8, "weight": 0.25}}))
    make_attacks().to_csv(folder / "robustness.csv", index=False)
    make_representation().to_csv(folder / "layers.csv", index=False)
    return folder


def make_monitor() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    lines = [(step, risk, *rng.normal(size=3), step % 5) for step in range(15) for risk in ("unlearn", "retain")]
    return pd.DataFrame(lines, columns=["step", "risk", "gradient", "cosine", "update", "age"])


def make_attacks() -> pd.DataFrame:
    """Lines of every attack, as robustness.py names their settings."""
    rng = np.random.default_rng(2)
    ways = {
        "relearn": ["step 0", "step 4", "step 8"],
        "quantize": ["as it is", "8 bits", "4 bits"],
        "sample": [f"k={k} of n=4 temperature=1 top_p=1 tau=0.9" for k in (1, 2, 4)],
        "prefix": ["plain", "role_play", "mean", "worst"],
        "paraphrase": ["plain", "paraphrased_question", "mean", "worst"],
    }
    lines = []
    for attack, settings in ways.items():
        for model in ("unlearned", "retain"):
            for setting in settings:
                of: tuple[str, ...] = (
                    ("leak", "best_rouge") if attack == "sample" else ("forget_rouge", "forget_probability", "forget_ps_exact")
                )
                of += ("retain_rouge",) if attack in ("relearn", "quantize") else ()
                numbers = {name: rng.uniform() for name in of}
                lines.append({"step": 12, "model": model, "attack": attack, "setting": setting, "rows": 8} | numbers)
    return pd.DataFrame(lines)


def make_representation() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    lines = [
        (12, model, "original", data, layer, *rng.uniform(0.5, 1, 2), 100)
        for model in ("unlearned", "retain")
        for data in ("forget", "retain")
        for layer in ("embed", "0", "1", "2")
    ]
    return pd.DataFrame(lines, columns=["step", "model", "beside", "data", "layer", "cka", "cosine", "tokens"])
