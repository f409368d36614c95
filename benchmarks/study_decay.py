"""Which c(gamma) is best on the digits: the paper's Table 3 from our own runs, with several seeds.

python -m benchmarks.study_decay --out DIR [--seeds 0 1 2]              # trains what is missing, measures, draws
python -m benchmarks.study_decay --draw benchmarks/results/decay_....json    # the figure of docs/images alone

Every family with lambda = 1, as in Table 3, and the truncated one with lambda = 4, the paper's final choice. Each run
is a third of the default training (600 of its 2,000 steps). Descent takes steps of eta = 0.04 / lambda, so that all
move alike where c is at its full scale, and its samples are measured along the way: where a family has its best FID
depends on how fast it comes down. FID as in evaluations: 1,797 class-balanced samples against all digits.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.bench_loader import commit, cpu_name
from eqm_dist import rng
from eqm_dist.evaluate.features import load_digit_classifier
from eqm_dist.evaluate.labels import labels_of
from eqm_dist.evaluate.metrics import FeatureMoments, feature_moments, frechet_distance
from eqm_dist.evaluate.train_classifier import digits
from eqm_dist.pretrained import load
from eqm_dist.run_directory import RESULT_FILE

IMAGES = Path(__file__).parent.parent / "docs" / "images"
FAMILIES: dict[str, dict[str, Any]] = {
    "constant": {"family": "constant", "gradient_scale": 1},
    "linear": {"family": "linear", "gradient_scale": 1},
    "truncated a=0.5": {"family": "truncated", "decay_start": 0.5, "gradient_scale": 1},
    "truncated a=0.8": {"family": "truncated", "decay_start": 0.8, "gradient_scale": 1},
    "truncated a=0.9": {"family": "truncated", "decay_start": 0.9, "gradient_scale": 1},
    "piecewise b=0.8": {"family": "piecewise", "decay_value": 0.8, "gradient_scale": 1},
    "piecewise b=1.4": {"family": "piecewise", "decay_value": 1.4, "gradient_scale": 1},
    "truncated a=0.8, lambda=4": {"family": "truncated", "decay_start": 0.8, "gradient_scale": 4},
}
PAPER = (40.81, 50.47, 38.98, 38.34, 41.22, 38.84, 38.75, 32.85)
"""FID-50K of Table 3 (EqM-B/2, ImageNet, 80 epochs), in the order of ``FAMILIES``; the last from Table 4."""
TRAINING = {
    "train.steps": 600, "checkpoint.every": 600, "evaluation.every": 0, "launch.launcher": "local",
    "track.mlflow": "false", "train.log_every": 100,
}  # fmt: skip
STEP = 0.04
MEASURED = (16, 20, 24, 28, 32, 36, 40, 48, 56, 64, 80)
LATER = {"linear": (96, 112, 128, 160)}
"""Evaluations of a family that slows down from the start and takes longer to arrive."""
SAMPLES, BATCH = 1797, 256


def measured(family: str) -> tuple[int, ...]:
    """The numbers of evaluations after which a family is measured."""
    return (*MEASURED, *LATER.get(family, ()))


def train(root: Path, family: str, seed: int) -> Path:
    """The run of a family and a seed; there already, or trained now."""
    run = root / f"{family.replace(' ', '-').replace(',', '').replace('=', '')}-seed{seed}"
    decay = {f"objective.decay.{key}": value for key, value in FAMILIES[family].items()}
    options = {**TRAINING, **decay, "run.root": root, "run.name": run.name, "run.seed": seed}
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    if not (run / RESULT_FILE).exists():
        with (root / f"{run.name}.log").open("w") as log:
            subprocess.run([sys.executable, "pipelines/train.py", *flags], stdout=log, stderr=log, check=True)
    return run


@torch.no_grad()
def descent(run: Path, family: str, seed: int) -> Iterator[tuple[int, Tensor]]:
    """The images [n, H, W, C] of a run after every NFE in ``measured``."""
    model = load(run)
    field, indices = model.field(torch.device("cpu")), torch.arange(SAMPLES)
    labels = labels_of("balanced", indices, 10, seed)
    x = rng.normal(seed, rng.Stream.START_NOISE, indices, (1, 8, 8))
    for evaluation in range(1, measured(family)[-1] + 1):
        moves = [
            field(part, given, torch.zeros(len(part)))
            for part, given in zip(x.split(BATCH), labels.split(BATCH), strict=True)
        ]
        x = x + STEP / FAMILIES[family]["gradient_scale"] * torch.cat(moves)
        if evaluation in measured(family):
            yield evaluation, model.autoencoder.decode(x)


def measure(run: Path, family: str, seed: int, reference: FeatureMoments) -> list[dict[str, Any]]:
    """Rows: the FID of a run after every NFE; those there already are read."""
    file = run / "fid.json"
    if not file.exists():
        extractor = load_digit_classifier()
        along = descent(run, family, seed)
        fids = {k: frechet_distance(reference, feature_moments(extractor, images.split(256))) for k, images in along}
        file.write_text(json.dumps(fids))
    return [
        {"family": family, "seed": seed, "evaluations": int(nfe), "fid": fid}
        for nfe, fid in json.loads(file.read_text()).items()
    ]


def summary(rows: list[dict[str, Any]]) -> dict[str, tuple[int, float, float]]:
    """For each family its best NFE (of the mean over seeds), and mean and deviation of the FID."""
    best = {}
    for family in FAMILIES:
        curve = {
            k: [row["fid"] for row in rows if row["family"] == family and row["evaluations"] == k]
            for k in measured(family)
        }
        k = min(curve, key=lambda k: mean(curve[k]))
        best[family] = (k, mean(curve[k]), stdev(curve[k]))
    return best


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Left the FID along the descent, right the best of each family against the paper's."""
    drawn = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=(1.25, 1))
    best = summary(rows)
    for family, paper in zip(FAMILIES, PAPER, strict=True):
        taken = measured(family)
        groups = [[r["fid"] for r in rows if r["family"] == family and r["evaluations"] == k] for k in taken]
        means, errors = [mean(group) for group in groups], [stdev(group) for group in groups]
        line = left.errorbar(taken, means, errors, marker=".", capsize=2, label=family)
        _, fid, deviation = best[family]
        right.errorbar([paper], [fid], [deviation], marker="o", capsize=3, color=line[0].get_color())
        right.annotate(family, (paper, fid), xytext=(6, 3), textcoords="offset points", fontsize=7.5)
    left.set(xlabel="evaluations of the field (step size 0.04 / lambda)", ylabel="FID", yscale="log")
    left.legend(frameon=False, fontsize=7.5)
    right.set(xlabel="FID-50K of the paper (ImageNet, Tables 3 and 4)", ylabel="best FID on the digits")
    right.margins(x=0.2)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the runs are, or go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draw", type=Path, help="draw the figure of a record")
    options = parser.parse_args()
    if options.draw is None:
        options.out.mkdir(parents=True, exist_ok=True)
        reference = feature_moments(load_digit_classifier(), digits()[0].split(256))
        rows = []
        for seed in options.seeds:
            for family in FAMILIES:
                found = measure(train(options.out, family, seed), family, seed, reference)
                print(f"{family}, seed {seed}: best FID {min(row['fid'] for row in found):.3f}", flush=True)
                rows += found
        record = {
            "command": " ".join(["python", "benchmarks/study_decay.py", "--seeds", *map(str, options.seeds)]),
            "commit": commit(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "hardware": {"cpu": cpu_name(), "cores": os.cpu_count()},
            "versions": {"python": platform.python_version(), "torch": version("torch")},
            "rows": rows,
        }
        options.draw = options.out / "decay.json"
        options.draw.write_text(json.dumps(record, indent=1) + "\n")
    rows = json.loads(options.draw.read_text())["rows"]
    for family, (nfe, fid, deviation) in summary(rows).items():
        print(f"{family:26} best FID {fid:6.3f} +- {deviation:.3f} after {nfe} evaluations")
    figure(rows).savefig(IMAGES / "decay_families.png", dpi=110)


if __name__ == "__main__":
    main()
