"""Measures the G-effects of a tiny model under torchrun, for test_geffect.py.

torchrun --standalone --nproc_per_node=2 measure_geffect.py OUT
"""

import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accelerate import PartialState
from test_geffect import measure_with_a_sweep

from utils import device

device()
tables = measure_with_a_sweep()
state = PartialState()
if state.is_main_process:
    Path(sys.argv[1]).write_bytes(pickle.dumps(tables))
state.wait_for_everyone()  # who ends first closes the connections that the other's gloo thread still listens on
state.destroy_process_group()
