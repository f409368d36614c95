"""Restore partly noised images of the training set, from every level of noise; measure how well.

python pipelines/denoise.py                                   the newest run in runs/, into denoise/NAME-stepN
python pipelines/denoise.py --model runs/mine --start-noise 0.9,0.6,0.3 --samples 2000
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from eqm_dist import cli
from eqm_dist.documents import to_json
from eqm_dist.errors import ConfigError
from eqm_dist.logs import setup_logging


def make_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = cli.command_parser(__doc__)
    cli.add_model_flags(parser, "evaluation.extractor")
    parser.add_argument(
        "--out", metavar="DIR", help="directory for the picture and the record (default: denoise/NAME-stepN)"
    )
    parser.add_argument(
        "--start-noise", default="1,0.75,0.5,0.25,0", metavar="LIST",
        help="levels of noise: 1 is noise alone, 0 the image itself (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--shards", metavar="DIR", help="data set of images to restore (default: the model's training data)"
    )
    parser.add_argument(
        "--samples", type=cli.count, default=1000, metavar="N", help="number of images (default: %(default)s)"
    )
    cli.add_work_flags(parser, batch=256, seeds="the noise")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        EqmDistError: one sentence for the user.
    """
    options = make_parser().parse_args(arguments)
    levels = _levels(options.start_noise)

    import torch

    from eqm_dist.build import load_extractor
    from eqm_dist.evaluate.metrics import feature_moments, frechet_distance
    from eqm_dist.pretrained import load
    from eqm_dist.provenance import provenance
    from eqm_dist.storage.files import atomic_write, make_writable, storage_errors
    from eqm_dist.tasks.denoise import restoration_figure, restoration_grid, restore

    model = load(options.model, **cli.model_arguments(options))
    model.require_pictures()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractor = load_extractor(*model.extractor("--evaluation.extractor")).to(device)
    latents, labels = model.real_latents(options.shards, options.samples, device)
    model.model  # noqa: B018 (whatever is wrong with it is said before anything is made)
    out = Path(options.out or f"denoise/{model.name}")
    make_writable(out)
    indices = torch.arange(len(latents))
    knows_time = model.config.objective.kind == "flow_matching"
    results = restore(
        lambda starts, gamma: model.generate(
            indices, labels, options.seed, options.batch, device,
            start=lambda rows: starts[rows], start_time=gamma if knows_time else 0.0,
        ),
        model.autoencoder.decode, latents, levels, seed=options.seed,
    )  # fmt: skip
    originals = model.autoencoder.decode(latents)
    moments = [feature_moments(extractor, images.split(options.batch), device)
               for images in (originals, *(result.images for result in results))]  # fmt: skip
    fids = [frechet_distance(moments[0], other) for other in moments[1:]]

    with storage_errors("write", out):
        restoration_grid(originals, results, columns=12).save(out / "restored.png")
        restoration_figure(results, fids).savefig(out / "curve.png", dpi=120)
    rows = [
        {"start_noise": result.start_noise, "fid": fid, "rms_error": result.error,
         "rms_error_of_start": result.start_error, "nfe": result.nfe}
        for result, fid in zip(results, fids, strict=True)
    ]  # fmt: skip
    record = {"model": model.source, "samples": len(latents), "seed": options.seed, "levels": rows, **provenance()}
    atomic_write(out / "denoise.json", (to_json(record, 1) + "\n").encode())
    print("start noise    FID   RMS error, before it    NFE")
    for row in rows:
        print("{start_noise:11.2f} {fid:6.3f} {rms_error:11.1f} {rms_error_of_start:10.1f} {nfe:6.1f}".format(**row))
    print(f"\n{out / 'restored.png'}\n{out / 'curve.png'}\n{out / 'denoise.json'}")


def _levels(text: str) -> list[float]:
    try:
        levels = [float(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if not levels or not all(0 <= level <= 1 for level in levels):
        raise ConfigError(f"--start-noise must be levels from 0 to 1 like 1,0.5,0, got {text}; correct it.")
    return levels


def start() -> NoReturn:
    """Run the command as a program."""
    setup_logging()
    cli.run(main)
