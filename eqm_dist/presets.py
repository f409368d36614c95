"""Named runs. Each states where it comes from, what it costs and what it should reach."""

from collections.abc import Callable

from eqm_dist.config import Config
from eqm_dist.options import parse


def digits() -> Config:
    """Scikit-learn's handwritten digits, on a laptop.

    Source: none; the recipe was searched for in docs/log.md. Cost: a few minutes on 2 cores. Expected: FID near the
    distance between two halves of the real digits. Command: ``python pipelines/train.py``.
    """
    return parse(
        Config,
        {
            "run": {"name": "digits"},
            "model": {"hidden_size": 96, "depth": 4, "num_heads": 4, "patch_size": 2},
            "optimizer": {"learning_rate": 2e-3, "warmup_steps": 100, "schedule": "cosine", "ema_decays": [0.99]},
            "sampler": {"name": "nag", "step_size": 0.02, "momentum": 0.6, "nfe": 24},
        },
        "preset digits",
    )


def eqm_b2() -> Config:
    """EqM-B/2 on ImageNet 256x256, 80 epochs (paper, Tables 3 and 4).

    Source: official code and README. Cost: about 10 GPU-hours on an H100 at 40% utilisation (derived, not measured).
    Expected: FID-50K 32.85 with 249 evaluations of gradient descent at step size 0.003.
    Command: ``python pipelines/train.py --preset eqm-b2 --data.shards DIR`` with your own ImageNet shards.
    """
    return _imagenet("eqm-b2", size="B", epochs=80)


def eqm_xl2() -> Config:
    """EqM-XL/2 on ImageNet 256x256, 1,400 epochs (paper, Table 1).

    Source: official code and README. Cost: about 900 GPU-hours on H100s at 40% utilisation (derived, not measured).
    Expected: FID-50K 1.90 with NAG, step size 0.0017, momentum 0.3, guidance 1.5 on three channels, 249 evaluations.
    Command: ``python pipelines/train.py --preset eqm-xl2 --data.shards DIR`` with your own ImageNet shards.
    """
    return _imagenet("eqm-xl2", size="XL", epochs=1400)


PRESETS: dict[str, Callable[[], Config]] = {"digits": digits, "eqm-b2": eqm_b2, "eqm-xl2": eqm_xl2}


def _imagenet(name: str, size: str, epochs: int) -> Config:
    images, global_batch = 1_281_167, 256
    return parse(
        Config,
        {
            "run": {"name": name},
            "data": {"latent_shape": [4, 32, 32], "num_classes": 1000, "flip": True},
            "model": {"size": size, "patch_size": 2, "learn_sigma": True},
            "train": {
                "steps": epochs * (images // global_batch),
                "global_batch": global_batch,
                "precision": "bf16",
                "log_every": 100,
            },
            "checkpoint": {"every": 5000},
            # The packaged extractor knows digits only; evaluate ImageNet models from their checkpoints.
            "evaluation": {"every": 0},
        },
        f"preset {name}",
    )
