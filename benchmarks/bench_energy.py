"""The two exact ways to the weight gradients of EqM-E, against each other and against a plain field.

python -m benchmarks.bench_energy [--repeats N]

EqM-E regresses g(x) = -grad E(x), so that its loss has to be differentiated twice: by x inside, by the weights outside.

- Double backward: autograd keeps the graph of grad E and goes back through it. What training uses.
- Forward mode: with v = stopgrad(g - target), the gradient of <v, g> by the weights is that of minus the slope of E
  along v, one forward-mode product: no inner graph. For the dot energy, E = -x . f(x), that is <v, f> + <J v, x>; for
  l2, E = ||f||^2 / 2, it is -<J v, f>. The value of the loss needs g all the same, one more forward and backward pass.

In matrix products of the size of a forward pass, a plain field takes 3 (forward, and backward for inputs and weights),
the double backward 6 (forward, its backward by x, and both again backwards, each by inputs or weights), and the forward
mode 8 (2 for g, 2 for value and slope, 4 back). Both need the attention kernel that is written in plain products: no
fused one has a second derivative or a forward mode (PyTorch issues 117629 and 128971). The forward mode needs plain
layer norms as well: through PyTorch's own its gradient by the weights is wrong without a word (issue 196700).

Each case runs in a process of its own on one thread; the cases take turns. Time is CPU time, as the clock of a shared
machine tells little; memory is the process's peak above what it held before the first step.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.bench_loader import commit, cpu_name
from eqm_dist.core.energy import ExplicitEnergy
from eqm_dist.core.objective import ConditionalField
from eqm_dist.models import SiT

# input size, patch, channels, width, depth, heads; batch
MODELS = {
    "digits": ((8, 2, 1, 96, 4, 4), 64),
    "S/4": ((32, 4, 4, 384, 12, 6), 8),
    "S/2": ((32, 2, 4, 384, 12, 6), 2),
}


class PlainLayerNorm(nn.Module):
    """LayerNorm without weights in operations that forward mode knows how to differentiate further."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def with_plain_norms(model: nn.Module) -> nn.Module:
    """The model itself, every LayerNorm of which has been replaced."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LayerNorm):
                assert not child.elementwise_affine
                setattr(parent, name, PlainLayerNorm(child.eps))
    return model


def plain(model: ConditionalField, x: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Squared error [B] of the model's own field."""
    return (model(x, labels) - target).square().flatten(1).mean(1)


def double_backward(model: ConditionalField, x: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Squared error [B] of the dot energy's field."""
    return plain(ExplicitEnergy(model, "dot"), x, labels, target)


def forward_mode(
    model: ConditionalField, x: Tensor, labels: Tensor, target: Tensor, energy: ExplicitEnergy | None = None
) -> Tensor:
    """The same [B], with the same weight gradients, from one forward-mode product; needs ``with_plain_norms``."""
    energy = energy or ExplicitEnergy(model, "dot")
    with torch.no_grad():
        error = energy(x, labels) - target
    with sdpa_kernel(SDPBackend.MATH):
        slope = torch.func.jvp(lambda x: energy.energy(x, labels), (x,), (error,))[1]
    # The value of the squared error with the gradient of 2 <error, g> = -2 slope.
    gradient = -2 * slope / error[0].numel()
    return error.square().flatten(1).mean(1) + (gradient - gradient.detach())


CASES: dict[str, Callable[..., Tensor]] = {
    "plain field": plain,
    "double backward": double_backward,
    "forward mode": forward_mode,
}


def measure(name: str, case: str, steps: int) -> dict[str, float]:
    """CPU milliseconds of a forward and backward pass (the median), and the peak of memory in MiB."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # torch's own, in its forward-mode rules
    (size, patch, channels, width, depth, heads), batch = MODELS[name]
    model = SiT(size, patch, channels, width, depth, heads, num_classes=10, zero_init=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    if case == "forward mode":
        with_plain_norms(model)
    x, target = (torch.randn(batch, *model.latent_shape, generator=generator) for _ in range(2))
    labels = torch.arange(batch) % 10
    held = memory_mib("VmRSS")
    times, loss = [], torch.zeros(())
    for _ in range(steps + 1):
        model.zero_grad()
        began = time.process_time()
        loss = CASES[case](model, x, labels, target).mean()
        loss.backward()
        times.append((time.process_time() - began) * 1e3)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return {
        "cpu_ms": statistics.median(times[1:]),
        "peak_mib": memory_mib("VmHWM") - held,
        "loss": loss.item(),
        "gradient_norm": norm.item(),
    }


def memory_mib(key: str) -> float:
    """One of the kernel's figures of this process."""
    (kib,) = re.findall(rf"^{key}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    return int(kib) / 1024


def in_a_process(name: str, case: str, steps: int) -> dict[str, float]:
    """The figures of one measurement in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.bench_energy", "--measure", name, case, "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes for each case")
    parser.add_argument("--steps", type=int, default=5, help="steps in each process")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "CASE"), help="one case, in this process")
    options = parser.parse_args()
    if options.measure:
        name, case = options.measure
        print(json.dumps(measure(name, case, options.steps)))
        return
    runs: dict[str, dict[str, list[dict[str, float]]]] = {name: {case: [] for case in CASES} for name in MODELS}
    for _ in range(options.repeats):
        for name in MODELS:
            for case in CASES:
                runs[name][case].append(in_a_process(name, case, options.steps))
    print(f"{'':8} {'':16} {'CPU ms':>8} {'of plain':>9} {'peak MiB':>9} {'of plain':>9}")
    medians: dict[str, dict[str, dict[str, float]]] = {}
    for name, cases in runs.items():
        medians[name] = {
            case: {key: statistics.median(run[key] for run in found) for key in found[0]}
            for case, found in cases.items()
        }
        base = medians[name]["plain field"]
        for case, found in medians[name].items():
            print(
                f"{name:8} {case:16} {found['cpu_ms']:8.0f} {found['cpu_ms'] / base['cpu_ms']:9.2f}"
                f" {found['peak_mib']:9.0f} {found['peak_mib'] / base['peak_mib']:9.2f}"
            )
    now = datetime.now(UTC)
    record: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.bench_energy", *sys.argv[1:]]),
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": 1, "load": os.getloadavg()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "batch": {name: batch for name, (_, batch) in MODELS.items()},
        "medians": medians,
        "runs": runs,
    }
    slug = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    path = Path(__file__).parent / "results" / f"energy_{slug}_{now:%Y-%m-%d}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
