"""Images drawn from a trained model by all actors of a cluster: what ``pipelines/sample.py`` calls."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from eqm_dist.data.image_set import GRID_FILE, NFE_FILE, RECORD_FILE, Format, ImageSet, Unit, open_image_set
from eqm_dist.documents import mapping_from_json, read_bounded
from eqm_dist.errors import DataError
from eqm_dist.evaluate.figures import nfe_histogram
from eqm_dist.evaluate.grid import sample_grid
from eqm_dist.evaluate.labels import labels_of
from eqm_dist.launch.actors import run_units
from eqm_dist.logs import Progress
from eqm_dist.options import dump
from eqm_dist.pretrained import Pretrained
from eqm_dist.provenance import provenance
from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.lease import hold
from eqm_dist.text import labelled

LEAST_UNIT, MOST_UNIT, UNITS = 32, 1024, 128
"""A set has about so many units, for any number of actors to share; one is what a kill can cost an actor."""
GRID_CLASSES, GRID_COLUMNS = 10, 10


def draw(
    model: Pretrained,
    out: Path,
    *,
    samples: int,
    labels: str,
    seed: int,
    batch: int,
    format: Format,
    launcher: str,
    actors: int | None = None,
) -> str:
    """Draw a set of images, or go on with one that was begun; returns the closing report.

    Args:
        model: what draws them.
        out: directory of the set (``data.image_set``).
        samples: images in all.
        labels: rule for the class of each (``evaluate.labels``).
        seed: image i depends on (weights, sampler, seed, i) alone.
        batch: images that an actor draws at once.
        format: png, tar or npz.
        launcher: ``ray``, or ``local`` for this process alone.
        actors: most actors; default all that the cluster has room for.

    Raises:
        EqmDistError: one sentence for the user.
    """
    labels_of(labels, torch.arange(1), model.config.data.num_classes, seed)
    model.require_pictures()  # here, in one sentence, and not on every actor
    model.model  # noqa: B018 (likewise)
    settings = {
        "model": model.source,
        "step": model.step,
        "weights_sha256": model.sha256,
        "sampler": dump(model.config.sampler),
        "labels": labels,
        "seed": seed,
    }
    unit = max(LEAST_UNIT, min(MOST_UNIT, math.ceil(samples / UNITS)))
    with hold(out, f"The set of images in {out}", "give another --out"):
        images = open_image_set(out, settings, format, samples, unit)
        if not images.complete():
            missing = images.missing()
            started, drawn = time.monotonic(), sum(unit.stop - unit.start for unit in missing)
            progress = Progress("drew", samples, done=samples - drawn)
            for unit, _ in run_units(DrawUnit(model, images, labels, seed, batch), missing, launcher, actors):
                progress.add(unit.stop - unit.start)
            seconds = time.monotonic() - started
            images.finish({**settings, "samples": samples, "images_per_s": drawn / seconds, **provenance()})
        return _report(model, images, out)


@dataclass(frozen=True)
class DrawUnit:
    """What an actor does: the images of a unit, drawn and written. Pickles, weights included."""

    model: Pretrained
    images: ImageSet
    labels: str
    seed: int
    batch: int

    def __call__(self, unit: Unit, device: torch.device) -> None:
        indices = torch.arange(unit.start, unit.stop)
        labels = labels_of(self.labels, indices, self.model.config.data.num_classes, self.seed)
        drawn = self.model.generate(indices, labels, self.seed, self.batch, device, many=True)
        facts = {"label": labels, "nfe": drawn.nfe, "complete": drawn.complete, "finite": drawn.finite}
        facts = {name: fact.cpu().numpy() for name, fact in facts.items()}
        self.images.write(unit, drawn.images.cpu().numpy(), facts, self.model.precision(device))


def _report(model: Pretrained, images: ImageSet, out: Path) -> str:
    try:
        record = mapping_from_json(read_bounded(out / RECORD_FILE))
    except (OSError, ValueError) as error:
        raise DataError(f"{out / RECORD_FILE} is damaged ({error}); delete {out} to start over.") from None
    classes = min(GRID_CLASSES, model.config.data.num_classes)
    wanted = min(images.count, classes * GRID_COLUMNS)
    grid = out / GRID_FILE
    first = torch.from_numpy(np.stack(list(images.read(wanted))))
    labels = labels_of(record["labels"], torch.arange(wanted), model.config.data.num_classes, record["seed"])
    with storage_errors("write", grid):
        sample_grid(first, labels, GRID_COLUMNS).save(grid)
    nfe = record["nfe"]
    lines = {
        "model": f"{model.source}{f', step {model.step:,}' if model.step is not None else ''}",
        "images": f"{images.count:,} as {images.format}, labels {record['labels']}, seed {record['seed']}",
        "NFE": f"{nfe['mean']:,.4g} an image",
        "precision": record["precision"],
        "speed": f"{record['images_per_s']:,.1f} images/s",
        "grid": str(grid),
    }
    if nfe["min"] < nfe["max"]:
        lines["NFE"] += f" (from {nfe['min']:,} to {nfe['max']:,}): {out / NFE_FILE}"
        with storage_errors("write", out / NFE_FILE):
            nfe_histogram(torch.tensor(images.nfe())).savefig(out / NFE_FILE, dpi=120)
    if record["cut_off"]:
        lines["cut off"] = f"{record['cut_off']:,} images by sampler.nfe, before they came to an end"
    if record["not_finite"]:
        lines["not finite"] = f"{record['not_finite']:,} images, which are blank; use a smaller step size"
    lines["record"] = str(out / RECORD_FILE)
    return "\n".join(["", f"{out} is complete", *labelled(lines, indent="  ")])
