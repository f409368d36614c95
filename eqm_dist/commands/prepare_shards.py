"""Images -> shards of posterior moments that training reads.

python pipelines/prepare_shards.py --source digits --out DIR
python pipelines/prepare_shards.py --source folder --input TREE --resolution 256 --mirror \\
    --autoencoder stabilityai/sd-vae-ft-ema --dtype float16 --out DIR
python pipelines/prepare_shards.py verify DIR            compare every byte and sample with the manifest
python pipelines/prepare_shards.py index DIR ...         make a data set of tars that others wrote
python pipelines/prepare_shards.py merge OUT DIR DIR ... join the data sets of several machines

Running the same command again goes on where it stopped.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from eqm_dist import cli
from eqm_dist.errors import ConfigError
from eqm_dist.logs import setup_logging
from eqm_dist.storage.location import DEADLINE_S, is_remote

if TYPE_CHECKING:
    from eqm_dist.data.sources import ImageSource

SOURCES = {
    "digits": "the embedded digits, 8x8 grey",
    "folder": "a tree INPUT/CLASS/NAME.jpg",
    "tars": "WebDataset tars of images, INPUT a file, directory or glob",
    "parquet": "Parquet or Arrow tables, INPUT a file, directory or glob",
    "idx": "the files of MNIST and its relatives, INPUT their directory or NAME-images-idx3-ubyte[.gz]",
}


def make_parser(command: str = "prepare") -> argparse.ArgumentParser:
    """The flags of this command, or of ``verify``, ``index`` or ``merge``."""
    return COMMANDS[command][0]()


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        EqmDistError: one sentence for the user.
    """
    command = arguments[0] if arguments and arguments[0] in COMMANDS else "prepare"
    COMMANDS[command][1](make_parser(command).parse_args(arguments[command != "prepare" :]))


def prepare_parser() -> argparse.ArgumentParser:
    parser = cli.command_parser(__doc__)
    parser.add_argument(
        "--source", choices=SOURCES, help="; ".join(f"{kind}: {text}" for kind, text in SOURCES.items())
    )
    parser.add_argument("--input", metavar="INPUT", help="place of the images, here or on s3://; not for digits")
    parser.add_argument("--out", metavar="DIR", help="directory or s3:// prefix for the shards; made if absent")
    parser.add_argument(
        "--staging",
        metavar="DIR",
        help="local or shared directory in which shards for an s3:// --out are written first",
    )
    parser.add_argument(
        "--resolution",
        type=cli.count,
        metavar="N",
        help="images are cropped to their centre NxN (default: their own size)",
    )
    parser.add_argument(
        "--channels", type=int, choices=[1, 3], help="1 for grey, 3 for RGB (default: 1 for idx, 3 for the others)"
    )
    parser.add_argument("--image-column", help="column of a table with the images (default: image)")
    parser.add_argument("--label-column", help="column of a table with the labels (default: label)")
    parser.add_argument(
        "--num-classes", type=cli.count, metavar="N", help="number of classes, where it is larger than the images show"
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.001,
        metavar="F",
        help="largest part of the images that may be broken; report.json lists them (default: %(default)s)",
    )
    parser.add_argument(
        "--max-image-pixels",
        type=cli.count,
        metavar="N",
        help="largest number of pixels of an image; one with more is broken (default: 178956970)",
    )
    _add_autoencoder(parser)
    parser.add_argument(
        "--samples-per-shard", type=int, default=256, metavar="N", help="samples in a shard (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        type=_dtype,
        default="float32",
        help="number format of the stored moments: float32 or float16 (default: float32)",
    )
    parser.add_argument("--mirror", action="store_true", help="also store the mirrored images, which data.flip needs")
    _add_deadline(parser)
    parser.add_argument(
        "--launcher",
        choices=["ray", "local"],
        default="ray",
        help="ray: the cluster of RAY_ADDRESS, or a local one; local: this process alone (default: %(default)s)",
    )
    return parser


def prepare(options: argparse.Namespace) -> None:
    if not (options.source and options.out):
        raise ConfigError(
            "--source and --out must be given, for example --source digits --out data/digits; see --help."
        )

    remote = is_remote(options.out)
    if remote != (options.staging is not None):
        rule = "an s3:// --out needs --staging" if remote else "--staging has no effect on a local --out"
        raise ConfigError(f"{rule}, received --out {options.out}; {'add' if remote else 'leave out'} --staging.")

    deadline_s = _deadline_s(options, options.input or "", options.out)

    # After parsing, for these import torch and --help must answer at once.
    from eqm_dist.data.publish import publish_shards
    from eqm_dist.data.shards import run_here, write_shards
    from eqm_dist.models.autoencoder import load_autoencoder

    source, class_names = _source(options, deadline_s)
    autoencoder = load_autoencoder(None if options.autoencoder == "identity" else options.autoencoder)
    runner = run_here
    if options.launcher == "ray":
        from eqm_dist.launch.ray_actors import run_on_ray as runner
    manifest = write_shards(
        options.staging or options.out,
        options.source,
        source,
        autoencoder,
        samples_per_shard=options.samples_per_shard,
        dtype=options.dtype,
        mirror=options.mirror,
        class_names=class_names,
        max_bad_fraction=options.max_bad_fraction,
        runner=runner,
    )
    if remote:
        publish_shards(Path(options.staging), options.out, deadline_s)
    shape = ",".join(map(str, manifest.latent_shape))
    print(f"{options.out} holds {manifest.num_samples:,} samples in {len(manifest.shards)} shards.")
    print(f"Train on it with --data.shards {options.out} --data.latent_shape [{shape}]", end=" ")
    print(f"--data.num_classes {manifest.num_classes}")


def verify_parser() -> argparse.ArgumentParser:
    parser = cli.command_parser(
        "Compare every byte and sample of shards with their manifest.", prog=f"{cli.program()} verify"
    )
    parser.add_argument("directory", metavar="DIR", help="a directory or an s3:// prefix")
    _add_deadline(parser)
    return parser


def verify(options: argparse.Namespace) -> None:
    deadline_s = _deadline_s(options, options.directory)

    from eqm_dist.data.verify import verify_shards

    manifest = verify_shards(options.directory, deadline_s)
    print(f"{options.directory} is whole: {manifest.num_samples:,} samples in {len(manifest.shards)} shards.")


def index_parser() -> argparse.ArgumentParser:
    parser = cli.command_parser(
        "Index and manifest for tars of KEY.moments.npy [V, 2C, H, W] and KEY.cls.", prog=f"{cli.program()} index"
    )
    parser.add_argument("directory", metavar="DIR", help="a directory or an s3:// prefix")
    _add_autoencoder(parser)
    parser.add_argument(
        "--images", default="unknown", metavar="TEXT", help="name of the source of the images (default: %(default)s)"
    )
    parser.add_argument(
        "--num-classes", type=cli.count, metavar="N", help="number of classes (default: the highest class plus one)"
    )
    _add_deadline(parser)
    return parser


def index(options: argparse.Namespace) -> None:
    deadline_s = _deadline_s(options, options.directory)

    from eqm_dist.data.assemble import index_directory
    from eqm_dist.models.autoencoder import load_autoencoder

    autoencoder = load_autoencoder(None if options.autoencoder == "identity" else options.autoencoder)
    manifest = index_directory(
        options.directory,
        source=options.images,
        autoencoder=autoencoder.id,
        autoencoder_location=autoencoder.location,
        latent_scale=autoencoder.latent_scale,
        latent_shift=autoencoder.latent_shift,
        num_classes=options.num_classes,
        deadline_s=deadline_s,
    )
    print(f"{options.directory} holds {manifest.num_samples:,} samples in {len(manifest.shards)} shards.")


def merge_parser() -> argparse.ArgumentParser:
    parser = cli.command_parser(
        "Join data sets of one kind into OUT; shards are hard-linked where the file system can, and S3 copies its own.",
        prog=f"{cli.program()} merge",
    )
    parser.add_argument("out", metavar="OUT", help="a directory or an s3:// prefix")
    parser.add_argument("directories", metavar="DIR", nargs="+", help="directories or s3:// prefixes")
    _add_deadline(parser)
    return parser


def merge(options: argparse.Namespace) -> None:
    deadline_s = _deadline_s(options, options.out, *options.directories)

    from eqm_dist.data.merge import merge_shards

    manifest = merge_shards(options.out, options.directories, deadline_s)
    print(f"{options.out} holds {manifest.num_samples:,} samples in {len(manifest.shards)} shards.")


COMMANDS: dict[str, tuple[Callable[[], argparse.ArgumentParser], Callable[[argparse.Namespace], None]]] = {
    "prepare": (prepare_parser, prepare),
    "verify": (verify_parser, verify),
    "index": (index_parser, index),
    "merge": (merge_parser, merge),
}


def _add_autoencoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--autoencoder",
        default="identity",
        metavar="NAME",
        help="the autoencoder that makes moments of images: identity (pixels), a folder that diffusers wrote, or a hub"
        " id such as stabilityai/sd-vae-ft-ema (default: %(default)s)",
    )


def _add_deadline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--deadline-s",
        type=float,
        metavar="S",
        help="seconds for which s3:// may fail or stall before it is given up (default: 60)",
    )


def _deadline_s(options: argparse.Namespace, *locations: str) -> float:
    if options.deadline_s is None:
        return DEADLINE_S
    if options.deadline_s <= 0:
        raise ConfigError(f"--deadline-s must be above 0, received {options.deadline_s:g}.")
    if not any(map(is_remote, locations)):
        raise ConfigError("--deadline-s has no effect where nothing is on s3://; leave it out.")
    return options.deadline_s


def _dtype(text: str) -> str:
    if text == "bfloat16":
        raise ConfigError(
            "--dtype must be float32 or float16, received bfloat16: the npy format has no bfloat16, so nothing but "
            "eqm-dist could read it; float16 is as small and holds moments more exactly."
        )
    if text not in ("float32", "float16"):
        raise ConfigError(f"--dtype must be float32 or float16, received {text}; see --help.")
    return text


def _source(options: argparse.Namespace, deadline_s: float) -> "tuple[ImageSource, tuple[str, ...]]":
    """The images that the options describe, and the names of their classes."""
    from eqm_dist.data.bounds import MAX_IMAGE_PIXELS, MAX_SIDE
    from eqm_dist.data.preprocess import PreparedImages
    from eqm_dist.data.sources import Digits, IdxImages, ImageFolder, ImageTable, ImageTars

    given = {
        "--input": options.input,
        "--resolution": options.resolution,
        "--channels": options.channels,
        "--num-classes": options.num_classes,
        "--max-image-pixels": options.max_image_pixels,
        "--image-column": options.image_column,
        "--label-column": options.label_column,
    }
    allowed = {"digits": [], "parquet": list(given)}.get(options.source, list(given)[:5])
    useless = [flag for flag, value in given.items() if value is not None and flag not in allowed]
    if useless:
        raise ConfigError(f"{useless[0]} has no effect with --source {options.source}; leave it out.")
    if options.source == "digits":
        return Digits(), ()
    if options.input is None:
        raise ConfigError(f"--source {options.source} needs --input, {SOURCES[options.source]}; add it.")
    if options.resolution is not None and options.resolution > MAX_SIDE:
        raise ConfigError(f"--resolution must be at most {MAX_SIDE:,}, received {options.resolution:,}; lower it.")
    if options.source == "parquet":
        raw = ImageTable(
            options.input,
            image_column=options.image_column or "image",
            label_column=options.label_column or "label",
            deadline_s=deadline_s,
        )
    else:
        kind = {"folder": ImageFolder, "tars": ImageTars, "idx": IdxImages}[options.source]
        raw = kind(options.input, deadline_s=deadline_s)
    channels = options.channels or (1 if options.source == "idx" else 3)
    images = PreparedImages(
        raw,
        resolution=options.resolution,
        channels=channels,
        num_classes=options.num_classes,
        max_pixels=options.max_image_pixels or MAX_IMAGE_PIXELS,
    )
    return images, images.class_names


def start() -> NoReturn:
    """Run the command as a program."""
    setup_logging()
    cli.run(main)
