"""Telling images of another kind: by the energy of a model, or by how far its field would move them (paper, Table 6).

A model at rest at its data has a small field there, and the energy of an explicit-energy model is low there. Both are
scores that are higher for what is foreign; the AUROC is the probability that a foreign image scores above a known one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch import Tensor

from eqm_dist import rng

Score = Callable[[Tensor], Tensor]
"""latents [B, C, h, w] -> scores [B]: higher is more foreign."""


@dataclass(frozen=True)
class Detection:
    """Scores of the known images and of one foreign set, and how well they tell them apart.

    Attributes:
        score, foreign: names of the score and of the set.
        known_scores, foreign_scores: [n] and [m].
        auroc: 0.5 is chance, 1 perfect, below 0.5 means that the foreign set looks more at home than the known one.
    """

    score: str
    foreign: str
    known_scores: Tensor
    foreign_scores: Tensor
    auroc: float


def field_norm(field: Callable[[Tensor], Tensor]) -> Score:
    """Root mean square of the field over the dimensions of a sample."""
    return lambda x: field(x).flatten(1).square().mean(1).sqrt()


def made_up_sets(images: Tensor, seed: int) -> dict[str, Tensor]:
    """Foreign sets that need no data: [n, H, W, C] uint8 like the known images.

    ``noise``: every pixel uniform; ``constant``: one uniform grey or colour an image; ``inverted``: 255 - image.
    """
    indices = torch.arange(len(images))
    uniform = rng.uniform(seed, rng.Stream.START_NOISE, indices, images.shape[1:])
    colours = rng.uniform(seed + 1, rng.Stream.START_NOISE, indices, images.shape[3:])[:, None, None]
    constant = colours.expand(-1, *images.shape[1:])
    as_images = {"noise": uniform, "constant": constant}
    return {
        **{name: (values * 256).clamp(max=255).to(torch.uint8) for name, values in as_images.items()},
        "inverted": 255 - images.cpu(),
    }


def detect(scores: Mapping[str, Score], known: Tensor, foreign: Mapping[str, Tensor], batch: int) -> list[Detection]:
    """Score the known latents [n, C, h, w] and those of every foreign set; all combinations."""
    found = []
    for name, score in scores.items():
        known_scores = _scored(score, known, batch)
        for other, latents in foreign.items():
            foreign_scores = _scored(score, latents, batch)
            truth = torch.cat([torch.zeros(len(known_scores)), torch.ones(len(foreign_scores))])
            auroc = float(roc_auc_score(truth.numpy(), torch.cat([known_scores, foreign_scores]).numpy()))
            found.append(Detection(name, other, known_scores, foreign_scores, auroc))
    return found


def detection_figure(detections: list[Detection]) -> Figure:
    """Histograms of every score: the known images filled, each foreign set as a line."""
    names = list(dict.fromkeys(detection.score for detection in detections))
    figure = Figure(figsize=(5 * len(names), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        shown = [detection for detection in detections if detection.score == name]
        known = shown[0].known_scores
        together = torch.cat([known, *(detection.foreign_scores for detection in shown)])
        edges = torch.linspace(float(together.min()), float(together.quantile(0.995)), 60).tolist()
        axes.hist(known.numpy(), bins=edges, density=True, color="0.8", label="known")
        for detection in shown:
            label = f"{detection.foreign} (AUROC {detection.auroc:.3f})"
            axes.hist(detection.foreign_scores.numpy(), bins=edges, density=True, histtype="step", label=label)
        axes.set(xlabel=name, ylabel="density")
        axes.legend(frameon=False, fontsize="small")
    return figure


@torch.no_grad()
def _scored(score: Score, latents: Tensor, batch: int) -> Tensor:
    return torch.cat([score(part).double().cpu() for part in latents.split(batch)])
