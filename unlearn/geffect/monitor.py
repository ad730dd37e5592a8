"""The G-effect between measurements: each step's own gradient and update along the risks' gradients V measured last.

    < g, V >                  g: as the optimiser gets it, of the step's rows, in train mode, after gradient rule and clipping
    < theta' - theta, V >     what the step did to the weights

At the price of inner products: at each step one reading of V, of the gradient and of the weights, whose products with V say
what the step before did. Products are of float32 (float64 for float64), summed so over `CHUNK` numbers at most and in float64
over the rest: < g, V > is exact to 3e-5 of the product of the norms, and the update, a difference, to 1e-4 of the norm of
theta times V element by element. (An Adam step at rate lr is lr sqrt(n) of the norm of V at most, and theta V some 0.05 of it.)

D directions (the risks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from unlearn.geffect.meter import Meter
from unlearn.geffect.parts import RISKS
from unlearn.geffect.risks import put_back, wide
from unlearn.io.files import write_whole
from unlearn.models.sharding import local
from unlearn.models.vectors import CHUNK_OF_A_GPU, read_all

CHUNK = 1 << 16  # numbers that are summed in float32 on a CPU: 1 << 14 take twice the time, and are 8 times as exact
COLUMNS = ("step", "risk", "gradient", "cosine", "update", "age")
D = len(RISKS)


def products(vectors: Sequence[Tensor], v: Tensor) -> Tensor:
    """Inner products of tensors of one shape with the stacked V (D, *shape), which is read once; of shards those here.

    Returns:
        (len(vectors) * D + 1,) float64: of the first with each V, of the second, ...; then the first with itself.
    """
    xs, w = [local(x.detach()).flatten() for x in vectors], local(v).flatten(1)
    size = CHUNK if xs[0].device.type == "cpu" else CHUNK_OF_A_GPU
    pieces = [torch.zeros(len(xs) * len(w) + 1, dtype=wide(w.dtype), device=xs[0].device)]
    for start in range(0, len(xs[0]), size):
        along = w[:, start : start + size].to(xs[0].device, wide(w.dtype))
        parts = [x[start : start + size].to(wide(w.dtype)) for x in xs]
        pieces.append(torch.cat([*(along @ part for part in parts), (parts[0] @ parts[0])[None]]))
    return torch.stack(pieces).sum(0, dtype=torch.float64)


class Monitor:
    """Writes `monitor.csv`: a line for each step and risk, appended when the step's update is known.

    Attributes:
        since: the step that V was measured at; None before it was.
        shown: < g, V > of the last step, for each risk.
    """

    def __init__(self, meter: Meter, file: Path) -> None:
        self.meter, self.file = meter, file
        self.since: int | None = None
        self.shown: list[float] = []
        self._pending: tuple[int, list[float], list[float], list[float]] | None = None

    def measured(self, step: int) -> None:
        """V is new: measured at this step's weights."""
        assert self._pending is None  # its update is along the V before
        self.since = step
        self._norms = self.meter.risk_norms()

    def measure(self, step: int) -> None:
        """Measure V alone: a run that goes on from a checkpoint has lost it."""
        with put_back(self.meter.model), self.meter.trained(True):
            self.meter.risk_gradients()
        self.measured(step)

    def take(self, step: int) -> None:
        """Note the gradient and the weights, right before the optimiser's step; the step before is then complete."""
        sums = torch.zeros(2 * D + 1, dtype=torch.float64, device=self.meter.model.device)
        for name, p in self.meter.parameters.items():
            if p.grad is None:  # the loss does not depend on it; what decays is moved all the same
                sums[D : 2 * D] += products([p], self.meter.directions[name])[:D]
            else:
                sums += products([p.grad, p], self.meter.directions[name])
        *dots, square = read_all([sums], self.meter.sharded)
        self._complete(dots[D:])
        norm = math.sqrt(square)
        self.shown = dots[:D]
        cosines = [e / (norm * v) if norm * v else math.nan for e, v in zip(self.shown, self._norms, strict=True)]
        self._pending = (step, self.shown, cosines, dots[D:])

    def finish(self) -> None:
        """Complete the last step by the present weights: before V is another, a checkpoint is saved, or training ends."""
        if self._pending is None:
            return
        sums = torch.zeros(D, dtype=torch.float64, device=self.meter.model.device)
        for name, p in self.meter.parameters.items():
            sums += products([p], self.meter.directions[name])[:D]
        self._complete(read_all([sums], self.meter.sharded))

    def _complete(self, after: Sequence[float]) -> None:
        if self._pending is None:
            return
        assert self.since is not None
        (step, gradient, cosines, before), self._pending = self._pending, None
        updates = [b - a for a, b in zip(before, after, strict=True)]
        rows = zip(RISKS, gradient, cosines, updates, strict=True)
        lines = [f"{step},{risk},{e!r},{cosine!r},{update!r},{step - self.since}\n" for risk, e, cosine, update in rows]
        if PartialState().is_main_process:
            try:
                with self.file.open("a") as file:
                    file.write("".join(lines))
            except OSError as error:
                what = f"{self.file}: the monitor of step {step} could not be written, what was saved before it is kept"
                raise OSError(f"{what}: {error}") from error


def keep(file: Path, steps: int, monitored: bool) -> None:
    """Drop the lines of steps that will be made (again), the first `steps` being made; the file goes where none is wanted.

    Raises:
        ValueError: a line of it is no step's.
    """
    if not PartialState().is_main_process:
        return
    lines = file.read_text().splitlines(keepends=True)[1:] if file.exists() else []
    try:
        kept = [line for line in lines if line.endswith("\n") and int(line.partition(",")[0]) < steps]
    except ValueError as error:
        raise ValueError(f"{file}: a line of it is no step's ({error})") from error
    if monitored or kept:
        write_whole(file, "".join([",".join(COLUMNS) + "\n", *kept]))
    elif file.exists():
        file.unlink()
