"""No tensor is left on another device than the model's: every kind of work on a pretended GPU (run_on_device.py)."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import ROOT, run_in


def test_all_work_runs_on_the_device(tmp_path: Path) -> None:
    """Training, measuring in each way, scoring, decoding and saving."""
    ends = json.loads(run_in(tmp_path, f"python {ROOT}/tests/run_on_device.py").stdout)
    assert ends == dict.fromkeys(ends, "done")
    assert len(ends) == 14


def test_a_tensor_left_on_the_cpu_is_noticed(tmp_path: Path) -> None:
    """So that the test above can fail: the same work with one on purpose."""
    ends = json.loads(run_in(tmp_path, f"python {ROOT}/tests/run_on_device.py planted").stdout)
    assert [name for name, end in ends.items() if "on the same device" not in end] == []
