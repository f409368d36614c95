"""Does the explicit energy of a trained EqM-E descend along its samples' ways, and how good are they?

python pipelines/train.py --run.name eqm-e --objective.energy dot --evaluation.every 0
python -m benchmarks.study_energy --run runs/eqm-e --out benchmarks/results/descent_....json

The figure goes to docs/images. A rise is a step after which a sample's energy is higher by more than 1e-6 of the
largest energy seen, the rounding of fp32. FID as in evaluations: class-balanced samples against all digits.
"""

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.bench_loader import commit, cpu_name
from eqm_dist import rng
from eqm_dist.core.energy import ExplicitEnergy
from eqm_dist.evaluate.features import load_digit_classifier
from eqm_dist.evaluate.metrics import feature_moments, frechet_distance
from eqm_dist.evaluate.train_classifier import digits
from eqm_dist.pretrained import Pretrained, load

IMAGES = Path(__file__).parent.parent / "docs" / "images"
DESCENTS = {
    "GD 0.003": (0.003, 0.0, 249), "GD 0.01": (0.01, 0.0, 74), "GD 0.02": (0.02, 0.0, 40), "GD 0.05": (0.05, 0.0, 30),
    "NAG 0.02, 0.6": (0.02, 0.6, 24), "GD 0.1": (0.1, 0.0, 20), "GD 0.15": (0.15, 0.0, 20), "GD 0.2": (0.2, 0.0, 20),
}  # fmt: skip
"""Step size, momentum, evaluations."""
MEASURED = {"NAG 0.02, 0.6": (14, 16, 18, 20, 24), "GD 0.02": (20, 24, 30)}
DRAWN = ("GD 0.02", "NAG 0.02, 0.6", "GD 0.1", "GD 0.2")


@torch.no_grad()
def way(energy: ExplicitEnergy, samples: int, name: str, nfe: int) -> list[Tensor]:
    """The points [n, 1, 8, 8] of a descent, start included."""
    step_size, momentum, _ = DESCENTS[name]
    indices = torch.arange(samples)
    x = rng.normal(0, rng.Stream.START_NOISE, indices, (1, 8, 8))
    moved, points = torch.zeros_like(x), [x]
    for _ in range(nfe):
        looks = (x + momentum * moved).split(256)
        fields = [energy(look, labels) for look, labels in zip(looks, (indices % 10).split(256), strict=True)]
        moved = step_size * torch.cat(fields)
        x = x + moved
        points.append(x)
    return points


@torch.no_grad()
def energies(energy: ExplicitEnergy, samples: int, name: str) -> Tensor:
    """[evaluations + 1, samples]."""
    labels = torch.arange(samples) % 10
    return torch.stack([energy.energy(x, labels) for x in way(energy, samples, name, DESCENTS[name][2])])


def rises(along: Tensor) -> dict[str, Any]:
    """How much of the descent went up."""
    risen = along.diff(dim=0) > 1e-6 * along.abs().max()
    return {
        "samples": along.shape[1],
        "evaluations": len(along) - 1,
        "steps_that_rise": risen.double().mean().item(),
        "samples_with_any_rise": risen.any(0).double().mean().item(),
        "median_energy_at_start": along[0].median().item(),
        "median_energy_at_end": along[-1].median().item(),
    }


def fids(model: Pretrained, energy: ExplicitEnergy, samples: int) -> dict[str, dict[int, float]]:
    """FID after some numbers of evaluations."""
    extractor = load_digit_classifier()
    reference = feature_moments(extractor, digits()[0].split(256))
    found: dict[str, dict[int, float]] = {}
    for name, numbers in MEASURED.items():
        points = way(energy, samples, name, max(numbers))
        found[name] = {
            k: frechet_distance(reference, feature_moments(extractor, model.autoencoder.decode(points[k]).split(256)))
            for k in numbers
        }
    return found


def figure(along: dict[str, Tensor]) -> Figure:
    """Median energy and the middle nine tenths of the samples, over evaluations."""
    drawn = Figure(figsize=(7, 4), layout="constrained")
    axes = drawn.subplots()
    for name in DRAWN:
        low, middle, high = along[name].quantile(torch.tensor([0.05, 0.5, 0.95]), dim=1)
        [line] = axes.plot(middle, label=name)
        axes.fill_between(range(len(middle)), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="evaluations", ylabel="energy (median, 5 % to 95 %)")
    axes.legend(frameon=False)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = load(options.run)
    energy = ExplicitEnergy(model.model, "dot")
    along = {name: energies(energy, 128, name) for name in DESCENTS}
    table = {name: rises(values) for name, values in along.items()}
    for name, row in table.items():
        print(name, {key: round(value, 4) for key, value in row.items()}, flush=True)
    figure(along).savefig(IMAGES / "energy_descent.png", dpi=110)
    found = fids(model, energy, 1797)
    print(found)
    record = {
        "command": "python -m benchmarks.study_energy --run runs/eqm-e",
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "step": model.step,
        "descents": table,
        "fid": found,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
