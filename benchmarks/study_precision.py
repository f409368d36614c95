"""What the precision of the sampler does to the FID of the digits.

python pipelines/train.py                                                                # runs/digits
python -m benchmarks.study_precision --run runs/digits --out FILE [--seeds 0 1 2] [--shards DIR]

For each seed the same start noise is followed in fp32 and in bf16, by the sampler of the run. The FID is measured
against all images of the data set, with the extractor of the run.
"""

import argparse
import json
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_loader import commit, cpu_name
from eqm_dist.data.loader import ShardReader
from eqm_dist.evaluate.extractors import load_extractor
from eqm_dist.evaluate.images import TrainingImages
from eqm_dist.evaluate.labels import balanced_labels
from eqm_dist.evaluate.metrics import FeatureMoments, feature_moments, frechet_distance
from eqm_dist.pretrained import Pretrained, load

BATCH = 256
PRECISIONS = ("fp32", "bf16")


def measured(
    model: Pretrained, extractor: torch.nn.Module, reference: FeatureMoments, seed: int, samples: int
) -> dict[str, Any]:
    """FID in each precision, and by how much bf16's differs."""
    indices = torch.arange(samples)
    labels = balanced_labels(indices, model.config.data.num_classes)
    found: dict[str, Any] = {"seed": seed}
    images = {}
    for precision in PRECISIONS:
        began = time.perf_counter()
        drawn = model.with_sampler(precision=precision).generate(indices, labels, seed, BATCH, torch.device("cpu"))
        images[precision] = drawn.images
        moments = feature_moments(extractor, drawn.images.split(BATCH))
        found[precision] = {
            "fid": frechet_distance(reference, moments),
            "mean_nfe": drawn.nfe.double().mean().item(),
            "seconds": time.perf_counter() - began,
        }
    found["relative_difference"] = found["bf16"]["fid"] / found["fp32"]["fid"] - 1
    levels = (images["bf16"].int() - images["fp32"].int()).abs().double()
    found["mean_pixel_difference"] = levels.mean().item()
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=1797)
    parser.add_argument("--shards", help="the data set, if it is not where the run had it")
    options = parser.parse_args()
    model = load(options.run, root=options.run.parent)
    extractor = load_extractor(*model.extractor("--run"))
    location = options.shards or model.training_data("--shards")
    real = TrainingImages(location, ShardReader(location), model.autoencoder, torch.device("cpu"))
    reference = feature_moments(extractor, real.read(0, len(real), BATCH))
    record = {
        "command": " ".join([Path(sys.executable).name, "-m", "benchmarks.study_precision", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": {"cpu": cpu_name(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "run": {"step": model.step, "weights_sha256": model.sha256, "sampler": model.config.sampler.model_dump()},
        "extractor": getattr(extractor, "id", None),
        "samples": options.samples,
    }
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        rows.append(measured(model, extractor, reference, seed, options.samples))
        options.out.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
