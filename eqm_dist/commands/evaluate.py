"""Measure images, or a model whose images are drawn, measured and forgotten: FID, sFID, KID, IS, precision, recall.

python pipelines/evaluate.py                                         the newest run in runs/, against its own data
python pipelines/evaluate.py --model runs/mine --samples 50000 --metrics fid,kid,precision,recall
python pipelines/evaluate.py --images samples/mine --reference photos/ --resolution 256
python pipelines/evaluate.py --images samples.npz --reference VIRTUAL_imagenet256_labeled.npz --metrics fid,sfid,is
python pipelines/evaluate.py --images a/ --reference b/ --extractor dinov2-vit-l-14

Images and references are folders of image files, tars, an .npz with arr_0, or shards. Every figure is printed and
appended to --out as one line of JSON that says how it came about.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from eqm_dist import cli
from eqm_dist.errors import ConfigError
from eqm_dist.logs import setup_logging
from eqm_dist.metric_settings import METRIC_NAMES, MetricSettings

MODEL_FLAGS = ("config", "model", "autoencoder", "samples", "labels", "seed")
SAMPLES = 50_000


def make_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = cli.command_parser(__doc__)
    parser.add_argument("--images", metavar="PATH", help="images to measure; without it, images are drawn from a model")
    cli.add_model_flags(parser)
    parser.add_argument(
        "--samples", type=cli.count, metavar="N",
        help=f"number of images to draw (default: as many as the reference has, at most {SAMPLES:,})",
    )  # fmt: skip
    parser.add_argument(
        "--labels",
        metavar="RULE",
        help="classes of the drawn images: balanced, random, or in turn like 3,1,4 (default: balanced)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the drawn images (default: 0)")
    parser.add_argument(
        "--reference", metavar="PATH",
        help="what the images are compared with: images, an .npz of ADM or pytorch-fid, or a file of --save-reference"
        " (default: the model's training data)",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", default="fid", metavar="LIST", help=f"some of {','.join(METRIC_NAMES)} (default: %(default)s)"
    )
    parser.add_argument(
        "--extractor", metavar="NAME",
        help="what computes the features: digits, inception, dinov2-vit-{s,b,l,g}-14, a file of"
        " pipelines/train_classifier.py, or module:factory"
        " (default: the model's, for --images inception)",
    )  # fmt: skip
    parser.add_argument(
        "--extractor-weights", metavar="FILE", help="file with the weights of inception (default: fetched at first use)"
    )
    parser.add_argument(
        "--resolution",
        type=cli.count,
        metavar="N",
        help="image files are cropped to their centre NxN (default: their own size)",
    )
    parser.add_argument("--channels", type=int, choices=[1, 3], help="image files are read as grey (1) or RGB (3)")
    parser.add_argument(
        "--kid-subsets",
        type=cli.count,
        default=MetricSettings.kid_subsets,
        metavar="N",
        help="number of subsets of the KID (default: %(default)s)",
    )
    parser.add_argument(
        "--kid-subset-size",
        type=cli.count,
        default=MetricSettings.kid_subset_size,
        metavar="N",
        help="images in a subset of the KID (default: %(default)s)",
    )
    parser.add_argument(
        "--save-reference",
        metavar="FILE",
        help="file for the statistics of the reference, to be used as --reference later",
    )
    parser.add_argument(
        "--cache", default="~/.cache/eqm-dist/statistics", metavar="DIR",
        help="directory that keeps the statistics of references; none keeps none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out",
        default="evaluations.jsonl",
        metavar="FILE",
        help="file to which the figures are appended (default: %(default)s)",
    )
    parser.add_argument("--mlflow", metavar="RUN", help="directory of the run whose MLflow record gets the figures")
    parser.add_argument(
        "--batch", type=cli.count, default=64, metavar="N",
        help="number of images computed at once (default: %(default)s)",
    )  # fmt: skip
    cli.add_actor_flags(parser)
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        EqmDistError: one sentence for the user.
    """
    options = make_parser().parse_args(arguments)
    overrides = cli.model_overrides(options)
    useless = [f"--{name}" for name in MODEL_FLAGS if getattr(options, name) is not None]
    useless += [f"--{key}" for layer, _ in overrides for key in layer]
    if options.images and useless:
        raise ConfigError(f"{useless[0]} has no effect on --images, which are drawn already; leave one of them out.")
    if options.save_reference and not options.save_reference.endswith(".safetensors"):
        raise ConfigError(f"--save-reference must end in .safetensors, received {options.save_reference}; rename it.")

    from eqm_dist.evaluate.record import append_records, table
    from eqm_dist.launch.evaluation import Judge, extractor_of, reference_of
    from eqm_dist.pretrained import load
    from eqm_dist.track.mlflow import log_metrics, recorded_run

    model = None
    if not options.images:
        model = load(options.model, autoencoder=options.autoencoder, overrides=overrides)
    extractor, weights = extractor_of(model, options.extractor, options.extractor_weights)
    judge = Judge(
        extractor=extractor,
        weights=weights,
        metrics=[metric.strip() for metric in options.metrics.split(",")],
        settings=MetricSettings(kid_subsets=options.kid_subsets, kid_subset_size=options.kid_subset_size),
        batch=options.batch,
        launcher=options.launcher,
        actors=options.actors,
        cache=None if options.cache == "none" else options.cache,
        resolution=options.resolution,
        channels=options.channels,
    )
    recorded = recorded_run(Path(options.mlflow)) if options.mlflow else None
    reference = judge.reference(options.reference or (reference_of(model) if model else None))
    if options.save_reference:
        if reference is None:
            raise ConfigError(f"--save-reference has no effect with --metrics {options.metrics}; leave it out.")
        reference.save(Path(options.save_reference))
    if model is None:
        records = judge.images(options.images, reference)
    else:
        known = reference.statistics.count if reference else None
        samples = options.samples or min(SAMPLES, known or SAMPLES)
        labels, seed = options.labels or "balanced", options.seed or 0
        records = judge.model(model, reference, samples=samples, labels=labels, seed=seed)
    append_records(Path(options.out), records)
    if recorded is not None:
        name = Path(judge.extractor.rpartition(":")[2]).stem
        figures = {f"eval/{record['metric']}_{name}": record["value"] for record in records}
        log_metrics(recorded, model.step or 0 if model else 0, figures)
    print(f"\n{table(records)}\n  record     {options.out}")


def start() -> NoReturn:
    """Run the command as a program."""
    setup_logging()
    cli.run(main)
