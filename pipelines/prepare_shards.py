"""Images -> shards of posterior moments that training reads; or the full check of such shards.

python pipelines/prepare_shards.py --source digits --out DIR
python pipelines/prepare_shards.py verify DIR

Running the same command again goes on where it stopped.
"""

import argparse
from collections.abc import Sequence

from eqm_dist.cli import run
from eqm_dist.errors import ConfigError
from eqm_dist.logs import setup_logging


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prepare_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", choices=["digits"], help="where the images come from")
    parser.add_argument("--out", metavar="DIR", help="directory for the shards; made if absent")
    parser.add_argument("--samples-per-shard", type=int, default=256, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16"],
        default="float32",
        help="of the stored moments (default: %(default)s)",
    )
    parser.add_argument("--mirror", action="store_true", help="store the mirrored images too, for data.flip")
    verify = parser.add_subparsers(dest="command", metavar="verify").add_parser(
        "verify", help="compare every byte and sample of shards with their manifest"
    )
    verify.add_argument("directory", metavar="DIR")
    options = parser.parse_args(arguments)
    if options.command is None and not (options.source and options.out):
        raise ConfigError(
            "--source and --out must be given, for example --source digits --out data/digits; see --help."
        )
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    # After parsing, for these import torch and --help must answer at once.
    if options.command == "verify":
        from eqm_dist.data.verify import verify_shards

        manifest = verify_shards(options.directory)
        print(f"{options.directory} is whole: {manifest.num_samples:,} samples in {len(manifest.shards)} shards.")
        return

    from eqm_dist.data.shards import write_shards
    from eqm_dist.data.sources import Digits
    from eqm_dist.models.autoencoder import IdentityAutoencoder

    manifest = write_shards(
        options.out,
        options.source,
        Digits(),
        IdentityAutoencoder(),
        samples_per_shard=options.samples_per_shard,
        dtype=options.dtype,
        mirror=options.mirror,
    )
    print(f"{options.out} holds {manifest.num_samples:,} samples in {len(manifest.shards)} shards.")


if __name__ == "__main__":
    setup_logging()
    run(main)
