"""Measures the G-effects of a tiny model in one process or under torchrun, for test_geffect.py.

torchrun --nproc_per_node=2 measure_geffect.py OUT
"""

import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accelerate import PartialState
from test_geffect import meter_of, pair, target_of

from utils import device

device()
model, reference = pair("phi")  # in float64 throughout as it is
target = target_of("npo", reference, "kl")
tables = meter_of(model, target, sweep={("rmu", 1.0): target_of("rmu_1", reference), ("npo", None): target}).measure()
if PartialState().is_main_process:
    Path(sys.argv[1]).write_bytes(pickle.dumps(tables))
