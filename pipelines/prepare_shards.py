"""Images -> shards of posterior moments that training reads; or the full check of such shards.

python pipelines/prepare_shards.py --source digits --out DIR
python pipelines/prepare_shards.py verify DIR

Running the same command again goes on where it stopped.
"""

import argparse
import logging
import sys

from eqm_dist.errors import EqmDistError


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prepare_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", choices=["digits"], help="where the images come from")
    parser.add_argument("--out", metavar="DIR", help="directory for the shards; made if absent")
    parser.add_argument("--samples-per-shard", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=["float32", "float16"], default="float32", help="of the stored moments; default: %(default)s"
    )
    verify = parser.add_subparsers(dest="command", metavar="verify").add_parser(
        "verify", help="compare every byte and sample of shards with their manifest"
    )
    verify.add_argument("directory", metavar="DIR")
    options = parser.parse_args(arguments)
    if options.command is None and not (options.source and options.out):
        parser.error("--source and --out are required, for example --source digits --out data/digits")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        # After parsing, for these import torch and --help must answer at once.
        if options.command == "verify":
            from eqm_dist.data.verify import verify_shards

            manifest = verify_shards(options.directory)
            print(f"{options.directory} is whole: {manifest.num_samples:,} samples in {len(manifest.shards)} shards.")
        else:
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
            )
            print(f"{options.out} holds {manifest.num_samples:,} samples in {len(manifest.shards)} shards.")
    except EqmDistError as error:
        print(f"prepare_shards.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
