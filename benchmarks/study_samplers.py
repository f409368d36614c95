"""What adaptive compute, momentum and the step size do to the FID of the digits, for EqM and for flow matching.

python pipelines/train.py                                                           # runs/digits
python pipelines/train.py --run.name fm --objective.kind flow_matching --evaluation.every 0
python -m benchmarks.study_samplers --eqm runs/digits --flow-matching runs/fm [--seeds 0 1 2] [--studies adaptive ...]
python -m benchmarks.study_samplers --draw benchmarks/results/samplers_....json     # figures of docs/images

One trajectory gives the samples of every NFE, and of every stopping limit: a sample that stopped
after k evaluations is the x_k of the fixed schedule (tests/test_core_sampling.py). Only ``wall_clock`` needs more: it
times ``generate`` itself. FID and yardstick as in evaluations: class-balanced samples, all 1,797 digits as reference.
Several runs of a kind are several training seeds. Every figure is a row of the record, none is averaged there.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.bench_loader import commit, cpu_name
from eqm_dist import rng
from eqm_dist.build import build_field, build_model
from eqm_dist.core.guidance import TimedField
from eqm_dist.core.ode import Dopri5, Heun
from eqm_dist.core.samplers import (
    Adam,
    BacktrackingStep,
    DecayingStep,
    GradientDescent,
    NesterovGradientDescent,
    Sampler,
    field_norm,
)
from eqm_dist.core.sampling import GradientNormStop, SamplingMethod
from eqm_dist.evaluate.features import load_digit_classifier
from eqm_dist.evaluate.figures import nfe_histogram
from eqm_dist.evaluate.generate import generate
from eqm_dist.evaluate.labels import balanced_labels
from eqm_dist.evaluate.metrics import FeatureMoments, feature_moments, frechet_distance
from eqm_dist.evaluate.train_classifier import digits
from eqm_dist.models.autoencoder import IdentityAutoencoder
from eqm_dist.pretrained import load

IMAGES = Path(__file__).parent.parent / "docs" / "images"
BATCH = 256
SHAPE = (1, 8, 8)
Row = dict[str, Any]

FIXED = (0.01, 74)
"""Step size and evaluations of plain descent for as long as the official schedule: 249 * 0.003 = 0.74."""
NORMS = (2.0, 1.4, 1.0, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
RATIOS = (0.4, 0.3, 0.2, 0.15, 0.12, 0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04)
STOP_NORM = 0.4
"""The limit of the studies that have but one."""

STEPS = 50
BEST_STEP_SIZE = {"eqm": 0.7 / STEPS, "flow_matching": 1 / STEPS}
"""As in the paper, whose best are 0.7 / 250 and 1 / 250."""
MULTIPLES = {"eqm": (0.57, 1.0, 1.43, 2.14, 3.57), "flow_matching": (0.57, 1.0, 1.43, 2.14)}
"""Step sizes of the paper's Figure 7, as multiples of these."""


# --- the measure ---


@cache
def classifier() -> torch.nn.Module:
    return load_digit_classifier()


@cache
def reference() -> FeatureMoments:
    return feature_moments(classifier(), digits()[0].split(BATCH))


def fid(latents: Tensor) -> float:
    images = IdentityAutoencoder().decode(latents.nan_to_num(0, 0, 0))
    return frechet_distance(reference(), feature_moments(classifier(), images.split(BATCH)))


def field_of(run: str) -> TimedField:
    trained = load(run)
    if trained.config.objective.kind == "flow_matching":
        trained = trained.with_sampler(name="euler", step_size=None, momentum=None)
    model = build_model(trained.config)
    model.load_state_dict(trained.weights)
    return build_field(trained.config, model.eval(), trained.config.data.num_classes)


@torch.no_grad()
def trajectory(
    field: TimedField, sampler: Sampler, nfe: int, seed: int, samples: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """x after each evaluation, and the norm [n] of the field that was seen in it."""
    rows = torch.arange(samples)
    x, labels = rng.normal(seed, rng.Stream.START_NOISE, rows, SHAPE), balanced_labels(rows, 10)
    state = sampler.start(x, nfe, 0.0)
    for number in range(nfe):
        progress = torch.full((samples,), number / nfe)
        point, when = sampler.look(x, state, progress)
        parts = zip(point.split(BATCH), labels.split(BATCH), when.split(BATCH), strict=True)
        value = torch.cat([field(*part) for part in parts])
        x, state, _ = sampler.move(x, state, value, progress)
        yield x, field_norm(value)


# --- the studies ---


def adaptive(run: str, seed: int, samples: int) -> Iterator[Row]:
    """FID against NFE: fixed schedules of every length, and stopping limits of both kinds."""
    step_size, nfe = FIXED
    points, norms = zip(*trajectory(field_of(run), GradientDescent(step_size), nfe, seed, samples), strict=True)
    path, norm = torch.stack(points), torch.stack(norms)
    for count in (*range(18, 40, 2), *range(40, nfe, 4), nfe):
        yield {"schedule": "fixed", "nfe": count, "fid": fid(path[count - 1])}
    for kind, limits in (("norm", NORMS), ("ratio", RATIOS)):
        for limit in limits:
            nfe = stopped(norm < (limit if kind == "norm" else limit * norm[0]))
            row = {"schedule": f"stop_{kind}", "limit": limit, "nfe": nfe.double().mean().item()}
            yield {**row, "fid": fid(path[nfe - 1, torch.arange(samples)]), "counts": torch.bincount(nfe).tolist()}


def wall_clock(run: str, seed: int, samples: int) -> Iterator[Row]:
    """Seconds of ``generate`` with the fixed schedule and with a stopping limit."""
    step_size, nfe = FIXED
    indices, field = torch.arange(samples), field_of(run)
    for stop in (None, GradientNormStop(norm=STOP_NORM)):
        start = time.process_time()
        generated = generate(
            field,
            indices=indices,
            labels=balanced_labels(indices, 10),
            latent_shape=SHAPE,
            method=SamplingMethod(GradientDescent(step_size), nfe, stop),
            seed=seed,
            decode=IdentityAutoencoder().decode,
            batch=BATCH,
        )
        seconds = time.process_time() - start
        moments = feature_moments(classifier(), generated.images.split(BATCH))
        row = {"schedule": "fixed" if stop is None else "stop_norm", "limit": stop.norm if stop else None}
        mean = generated.nfe.double().mean().item()
        yield {**row, "nfe": mean, "cpu_s": seconds, "fid": frechet_distance(reference(), moments)}


def momentum(run: str, seed: int, samples: int) -> Iterator[Row]:
    """Few evaluations: plain and accelerated descent, at the step size of the fixed schedule and twice it."""
    field = field_of(run)
    for step_size, look_ahead, nfe in (
        (0.01, 0, 44),
        (0.01, 0.3, 44),
        (0.02, 0, 26),
        (0.02, 0.3, 26),
        (0.02, 0.6, 26),
    ):
        path = trajectory(field, NesterovGradientDescent(step_size, look_ahead), nfe, seed, samples)
        for count, (x, _) in enumerate(path, 1):
            if count >= 10 and count % 2 == 0:
                yield {"step_size": step_size, "momentum": look_ahead, "nfe": count, "fid": fid(x)}


def step_size(run: str, seed: int, samples: int) -> Iterator[Row]:
    """The same number of steps with other step sizes (paper, Figure 7).

    EqM also with the stopping limit. Flow matching's clock goes on past 1 with its steps, or is held there, at the end
    of the time that it was trained on.
    """
    kind = load(run).config.objective.kind
    network = field_of(run)
    for multiple in MULTIPLES[kind]:
        size = multiple * BEST_STEP_SIZE[kind]
        row = {"kind": kind, "multiple": multiple, "step_size": size}
        for latest in (math.inf, 1.0) if kind == "flow_matching" and multiple > 1 else (math.inf,):

            def field(x: Tensor, labels: Tensor, way: Tensor, size: float = size, latest: float = latest) -> Tensor:
                return network(x, labels, (way * STEPS * size).clamp(max=latest))

            points, norms = zip(*trajectory(field, GradientDescent(size), STEPS, seed, samples), strict=True)
            yield {**row, "variant": "clock held" if latest == 1 else "", "nfe": STEPS, "fid": fid(points[-1])}
            if kind == "eqm":
                last = stopped(torch.stack(norms) < STOP_NORM)
                x = torch.stack(points)[last - 1, torch.arange(samples)]
                yield {**row, "variant": "stopped", "nfe": last.double().mean().item(), "fid": fid(x)}


def stopped(below: Tensor) -> Tensor:
    """The evaluations [n] after which samples stop, from whether [evaluations, n] they may."""
    return torch.where(below.any(0), below.int().argmax(0) + 1, len(below))


def methods(run: str, seed: int, samples: int) -> Iterator[Row]:
    """Every other method: for EqM the descents, for flow matching the integrators."""
    kind, field = load(run).config.objective.kind, field_of(run)
    if kind == "flow_matching":
        for steps in (24, 50):
            *_, (x, _) = trajectory(field, GradientDescent(1 / steps), steps, seed, samples)
            yield {"kind": kind, "method": "euler", "nfe": steps, "fid": fid(x)}
        for name, sampler, nfe in (("heun", Heun(), 24), ("heun", Heun(), 50), ("dopri5", Dopri5(), 500)):
            yield {"kind": kind, "method": name, **_generated(field, sampler, nfe, seed, samples)}
        return
    descents: dict[str, tuple[Sampler, int]] = {
        "gd 0.02, decay to 0.005": (GradientDescent(0.02, DecayingStep(0.005)), 30),
        "gd 0.03": (GradientDescent(0.03), 24),
        "gd 0.12": (GradientDescent(0.12), 24),
        "gd 0.12, backtracking": (GradientDescent(0.12, BacktrackingStep()), 24),
        "nag 0.02, 0.6, decay to 0.005": (NesterovGradientDescent(0.02, 0.6, DecayingStep(0.005)), 30),
        "adam 0.1, decay to 0.01": (Adam(0.1, DecayingStep(0.01)), 40),
        "adam 0.2, decay to 0.01": (Adam(0.2, DecayingStep(0.01)), 40),
    }
    for name, (sampler, nfe) in descents.items():
        for count, (x, _) in enumerate(trajectory(field, sampler, nfe, seed, samples), 1):
            if (count >= 12 and count % 4 == 0) or count == nfe:
                yield {"kind": kind, "method": name, "nfe": count, "fid": fid(x)}
    for name, sampler, nfe in (("heun", Heun(0.4), 40), ("dopri5", Dopri5(0.4), 500)):
        yield {"kind": kind, "method": name, **_generated(field, sampler, nfe, seed, samples)}


def _generated(field: TimedField, sampler: Sampler, nfe: int, seed: int, samples: int) -> Row:
    indices = torch.arange(samples)
    generated = generate(
        field,
        indices=indices,
        labels=balanced_labels(indices, 10),
        latent_shape=SHAPE,
        method=SamplingMethod(sampler, nfe),
        seed=seed,
        decode=IdentityAutoencoder().decode,
        batch=BATCH,
    )
    moments = feature_moments(classifier(), generated.images.split(BATCH))
    return {"nfe": generated.nfe.double().mean().item(), "fid": frechet_distance(reference(), moments)}


STUDIES: dict[str, tuple[Callable[[str, int, int], Iterator[Row]], int]] = {
    "adaptive": (adaptive, 1797),
    "step_size": (step_size, 240),
    "momentum": (momentum, 360),
    "methods": (methods, 360),
    "wall_clock": (wall_clock, 512),
}
"""Study and the number of its samples: fewer raise every FID, and compare among themselves."""


# --- the figures ---


def draw(rows: list[Row]) -> None:
    """The figures of those studies that are in the record."""
    draw_adaptive([row for row in rows if row["study"] == "adaptive"])
    draw_momentum([row for row in rows if row["study"] == "momentum"])
    draw_step_size([row for row in rows if row["study"] == "step_size"])


def draw_adaptive(rows: list[Row]) -> None:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    labels = {"fixed": "fixed number for all", "stop_norm": "stop below a norm", "stop_ratio": "stop below a ratio"}
    for (schedule, label), marker in zip(labels.items(), ("o-", "s-", "^-"), strict=True):
        curve = spread(row for row in rows if row["schedule"] == schedule)
        curve = [point for point in curve if point[0] >= 22]
        _bars(axes, curve, label, marker)
    axes.set_xlabel("evaluations of the field per sample (mean)")
    axes.set_ylabel("FID, 1,797 samples")
    _log_scale(axes, (1.5, 2, 3, 4, 6, 8, 12, 16))
    axes.legend(frameon=False)
    figure.savefig(IMAGES / "samplers_adaptive.png", dpi=150)
    counts = next(row["counts"] for row in rows if (row["schedule"], row.get("limit")) == ("stop_norm", STOP_NORM))
    nfe = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    nfe_histogram(nfe).savefig(IMAGES / "samplers_nfe.png", dpi=150)


def draw_momentum(rows: list[Row]) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, size in zip(figure.subplots(1, 2, sharey=True), (0.01, 0.02), strict=True):
        for look_ahead, marker in zip((0, 0.3, 0.6), ("o-", "s-", "^-"), strict=True):
            curve = spread(row for row in rows if (row["step_size"], row["momentum"]) == (size, look_ahead))
            if curve:
                _bars(axes, curve, f"NAG, momentum {look_ahead:g}" if look_ahead else "GD", marker)
        axes.set_title(f"step size {size:g}")
        axes.set_xlabel("evaluations of the field")
        _log_scale(axes, (3, 4, 6, 10, 20, 40, 100))
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("FID, 360 samples")
    figure.savefig(IMAGES / "samplers_momentum.png", dpi=150)


def draw_step_size(rows: list[Row]) -> None:
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    curves = {
        ("eqm", ""): ("EqM, 50 evaluations", "o-"),
        ("eqm", "stopped"): (f"EqM, stopped below {STOP_NORM}", "o--"),
        ("flow_matching", ""): ("flow matching, 50 evaluations", "s-"),
        ("flow_matching", "clock held"): ("flow matching, clock held at 1", "s--"),
    }
    for (kind, variant), (label, style) in curves.items():
        chosen = (row for row in rows if (row["kind"], row["variant"]) == (kind, variant))
        _bars(axes, spread(chosen, "multiple"), label, style, "C0" if kind == "eqm" else "C1")
    axes.set_xlabel("step size, as a multiple of 0.7/50 (EqM) or 1/50 (flow matching)")
    axes.set_ylabel("FID, 240 samples")
    _log_scale(axes, (4, 6, 10, 20, 40, 100, 200))
    axes.legend(frameon=False)
    figure.savefig(IMAGES / "samplers_step_size.png", dpi=150)


def spread(rows: Iterable[Row], x: str = "nfe") -> list[tuple[float, float, float, float]]:
    """Mean x, then mean, least and greatest FID over runs and seeds, for each setting."""
    settings: dict[Any, list[Row]] = {}
    for row in rows:
        settings.setdefault(row.get("limit", row[x]), []).append(row)
    points = []
    for same in settings.values():
        fids = [row["fid"] for row in same]
        points.append((sum(row[x] for row in same) / len(same), sum(fids) / len(fids), min(fids), max(fids)))
    return sorted(points)


def _bars(axes: Any, curve: list[tuple[float, ...]], label: str, style: str, color: str | None = None) -> None:
    x, mean, low, high = zip(*curve, strict=True)
    below = [m - least for m, least in zip(mean, low, strict=True)]
    above = [most - m for m, most in zip(mean, high, strict=True)]
    axes.errorbar(x, mean, yerr=[below, above], label=label, fmt=style, color=color, markersize=4, capsize=3)


def _log_scale(axes: Any, ticks: tuple[float, ...]) -> None:
    axes.set_yscale("log")
    axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def main() -> None:
    """Run the studies, or draw a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eqm", nargs="*", default=[], help="run directories, one a training seed")
    parser.add_argument("--flow-matching", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="sampling seeds")
    parser.add_argument("--studies", nargs="*", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/samplers_DATE.json; rows are added to it")
    parser.add_argument("--draw", type=Path, help="draw this record and leave")
    options = parser.parse_args()
    if options.draw is not None:
        draw(json.loads(options.draw.read_bytes())["rows"])
        return
    now = datetime.now(UTC)
    path = options.out or Path(__file__).parent / "results" / f"samplers_{now:%Y-%m-%d}.json"
    record = json.loads(path.read_bytes()) if path.exists() else {
        "commands": [],
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "rows": [],
    }  # fmt: skip
    record["commands"].append(" ".join(["python", "-m", "benchmarks.study_samplers", *sys.argv[1:]]))
    for seed in options.seeds:
        for name in options.studies:
            study, samples = STUDIES[name]
            runs = (
                options.eqm if name in ("adaptive", "momentum", "wall_clock") else options.eqm + options.flow_matching
            )
            for run in runs:
                for row in study(run, seed, samples):
                    record["rows"].append({"study": name, "run": Path(run).name, "seed": seed, **row})
                    print({key: value for key, value in record["rows"][-1].items() if key != "counts"}, flush=True)
                path.write_text(json.dumps(record, indent=None, separators=(",", ":")).replace("},{", "},\n{") + "\n")


if __name__ == "__main__":
    main()
