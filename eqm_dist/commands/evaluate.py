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
from typing import TYPE_CHECKING, NoReturn

from eqm_dist import cli
from eqm_dist.errors import ConfigError
from eqm_dist.logs import setup_logging
from eqm_dist.metric_settings import METRIC_NAMES, MetricSettings

if TYPE_CHECKING:
    from eqm_dist.track.mlflow import MlflowRun

REFERENCE_FLAGS = ("reference", "cache", "save-reference")
CACHE = "~/.cache/eqm-dist/statistics"
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
    parser.add_argument("--seed", type=cli.seed, metavar="N", help="seed of the drawn images (default: 0)")
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
        "--max-image-pixels",
        type=cli.count,
        metavar="N",
        help="largest number of pixels of an image file (default: 178956970)",
    )
    parser.add_argument(
        "--kid-subsets",
        type=cli.count,
        metavar="N",
        help=f"number of subsets of the KID (default: {MetricSettings.kid_subsets})",
    )
    parser.add_argument(
        "--kid-subset-size",
        type=cli.count,
        metavar="N",
        help=f"images in a subset of the KID (default: {MetricSettings.kid_subset_size})",
    )
    parser.add_argument(
        "--save-reference",
        metavar="FILE",
        help="file for the statistics of the reference, to be used as --reference later",
    )
    parser.add_argument(
        "--cache", metavar="DIR",
        help=f"directory that keeps the statistics of references; none keeps none (default: {CACHE})",
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
    metrics = [metric.strip() for metric in options.metrics.split(",")]
    _check_flags(options, metrics, [key for layer, _ in overrides for key in layer])

    from eqm_dist.data.bounds import MAX_IMAGE_PIXELS
    from eqm_dist.evaluate.record import append_records, table
    from eqm_dist.evaluate.statistics import metric_of
    from eqm_dist.launch.evaluation import Judge, extractor_of
    from eqm_dist.pretrained import load
    from eqm_dist.storage.files import make_writable, try_append
    from eqm_dist.track.mlflow import log_metrics

    compares = any(metric.compares for metric in list(map(metric_of, metrics)))
    useless = [f"--{name}" for name in REFERENCE_FLAGS if getattr(options, name.replace("-", "_")) is not None]
    if useless and not compares:
        raise ConfigError(f"{useless[0]} has no effect with --metrics {options.metrics}; leave it out.")
    # Whatever is to be written at the end is tried now, for hours may lie between.
    out = Path(options.out)
    try_append(out)
    if options.save_reference:
        make_writable(Path(options.save_reference).absolute().parent)

    model = None
    if not options.images:
        model = load(options.model, autoencoder=options.autoencoder, overrides=overrides, root=cli.root_from(options))
    recorded = _recorded(options) if options.mlflow else None
    extractor, weights = extractor_of(model, options.extractor, options.extractor_weights)
    settings = {"kid_subsets": options.kid_subsets, "kid_subset_size": options.kid_subset_size}
    judge = Judge(
        extractor=extractor,
        weights=weights,
        metrics=metrics,
        settings=MetricSettings(**{name: value for name, value in settings.items() if value is not None}),
        batch=options.batch,
        launcher=options.launcher,
        actors=options.actors,
        cache=None if options.cache == "none" else options.cache or CACHE,
        resolution=options.resolution,
        channels=options.channels,
        max_pixels=options.max_image_pixels or MAX_IMAGE_PIXELS,
    )
    location = options.reference
    if location is None and model is not None and compares:
        location = model.training_data("--reference")
    if model is not None and options.samples is not None:
        judge.check_samples(options.samples, "--samples")
    if options.images:
        judge.check_images(options.images)
    if options.max_image_pixels is not None and not any(map(judge.decodes, filter(None, (options.images, location)))):
        raise ConfigError("--max-image-pixels has no effect where no image files or tars are read; leave it out.")
    reference = judge.reference(location)
    if options.save_reference and reference is not None:
        reference.save(Path(options.save_reference))
    if model is None:
        records = judge.images(options.images, reference)
    else:
        known = reference.statistics.count if reference else None
        samples = options.samples or min(SAMPLES, known or SAMPLES)
        labels, seed = options.labels or "balanced", options.seed or 0
        records = judge.model(model, reference, samples=samples, labels=labels, seed=seed)
    print(f"\n{table(records)}", flush=True)
    append_records(out, records)
    print(f"  record     {options.out}")
    if recorded is not None:
        name = Path(judge.extractor.rpartition(":")[2]).stem
        figures = {f"eval/{record['metric']}_{name}": record["value"] for record in records}
        log_metrics(recorded, model.step or 0 if model else 0, figures)


def _check_flags(options: argparse.Namespace, metrics: Sequence[str], keys: Sequence[str]) -> None:
    """Refuse flags that have no effect beside the others; ``keys`` are those of the config.

    Raises:
        ConfigError: there is one.
    """
    cli.check_actors(options)
    useless = [f"--{name}" for name in MODEL_FLAGS if getattr(options, name) is not None]
    useless += [f"--{key}" for key in keys]
    if options.images and not options.mlflow and cli.root_from(options) is not None:
        useless.append(f"--{cli.ROOT}")
    if options.images and useless:
        raise ConfigError(f"{useless[0]} has no effect on --images, which are drawn already; leave one of them out.")
    for flag, value in (("--kid-subsets", options.kid_subsets), ("--kid-subset-size", options.kid_subset_size)):
        if value is not None and "kid" not in metrics:
            raise ConfigError(f"{flag} has no effect with --metrics {options.metrics}; leave it out, or add kid.")
    if options.save_reference and not options.save_reference.endswith(".safetensors"):
        raise ConfigError(f"--save-reference must end in .safetensors, received {options.save_reference}; rename it.")


def _recorded(options: argparse.Namespace) -> "MlflowRun":
    """The MLflow record that gets the figures, which must be that of a run of the user's own.

    Raises:
        ConfigError: it is not, or was not recorded: its directory says to which server credentials go.
    """
    from eqm_dist.pretrained import is_own
    from eqm_dist.runs import runs_root
    from eqm_dist.storage.location import local_path
    from eqm_dist.track.mlflow import recorded_run

    run, runs = local_path(options.mlflow), runs_root(cli.root_from(options))
    if not is_own(run, runs):
        raise ConfigError(
            f"--mlflow must name one of your own runs, and {run} does not lie in {runs}; name the directory of your"
            " runs with --run.root if it is yours."
        )
    return recorded_run(run)


def start() -> NoReturn:
    """Run the command as a program."""
    setup_logging()
    cli.run(main)
