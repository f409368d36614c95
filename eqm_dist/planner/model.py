"""What the plan knows of a run: its model's shape, its engine, and how it is spread. Made from a config."""

from dataclasses import dataclass, replace
from typing import Any, Self

from eqm_dist.config import Config
from eqm_dist.errors import ConfigError
from eqm_dist.models.sizes import forward_macs, parameter_count
from eqm_dist.options import required

NODE = 8
"""GPUs of a node."""


@dataclass(frozen=True)
class Work:
    """A run on a number of GPUs.

    Attributes:
        tokens: of an image.
        gpus: workers, one each.
        batch: images of an update, of all workers.
        micro: most images of one pass of a worker; None for all that it has.
        stage: of ZeRO; 0 also for the plain engine.
        moment_bytes: of an image as the shards hold it.
        energy: whether an explicit energy is trained, by a double backward.
    """

    parameters: int
    trained: int
    macs: int
    width: int
    depth: int
    heads: int
    tokens: int
    latent_values: int
    gpus: int
    batch: int
    micro: int | None
    stage: int
    plain: bool
    offload: bool
    checkpointing: bool
    precision: str
    compiled: bool
    emas: int
    steps: int
    save_every: int
    nfe: int
    guided: bool
    sampling_batch: int
    moment_bytes: int
    energy: bool

    @classmethod
    def of(cls, config: Config, gpus: int) -> Self:
        """The work of a config.

        Raises:
            ConfigError: there are more GPUs than images in a batch.
        """
        channels, side, _ = config.data.latent_shape
        width, depth = required(config.model.hidden_size), required(config.model.depth)
        heads = required(config.model.num_heads)
        shape: dict[str, Any] = {
            "input_size": side, "patch_size": config.model.patch_size, "in_channels": channels, "hidden_size": width,
            "depth": depth, "learn_sigma": config.model.learn_sigma,
        }  # fmt: skip
        counted = {
            **shape,
            "num_classes": config.data.num_classes,
            "qk_norm_size": width // heads if config.model.qk_norm else 0,
        }
        energy = config.objective.energy not in (None, "none")
        stage = None if config.launch.launcher == "local" else config.engine.stage(max(2, gpus))  # planned for several
        work = cls(
            parameters=parameter_count(**counted),
            trained=parameter_count(**counted, trainable_only=True),
            macs=forward_macs(**shape),
            width=width,
            depth=depth,
            heads=heads,
            tokens=(side // config.model.patch_size) ** 2,
            latent_values=channels * side**2,
            gpus=gpus,
            batch=config.train.global_batch,
            micro=config.train.micro_batch,
            stage=stage or 0,
            plain=stage is None,
            offload=config.engine.offload == "cpu",
            checkpointing=config.train.activation_checkpointing,
            precision=config.train.precision,
            compiled=config.train.compile != "never" and config.engine.zero_stage != 3 and not energy,
            emas=len(config.optimizer.ema_decays),
            steps=config.train.steps,
            save_every=config.checkpoint.every,
            nfe=config.sampler.nfe,
            guided=config.sampler.cfg_scale != 1,
            sampling_batch=config.evaluation.batch,
            # Means and deviations of the latents, float16, and those of the mirrored image (docs/data.md).
            moment_bytes=2 * 2 * channels * side**2 * (2 if config.data.flip else 1),
            energy=energy,
        )
        work.check()
        return work

    def check(self) -> None:
        """Refuse what cannot be spread.

        Raises:
            ConfigError: there are more GPUs than images in a batch.
        """
        if self.gpus > self.batch:
            raise ConfigError(
                f"{self.gpus:,} GPUs cannot share a batch of {self.batch:,} images; lower --gpus, or raise"
                " --train.global_batch, which makes it another training."
            )

    @property
    def bf16(self) -> bool:
        """Whether passes run in autocast."""
        return self.precision == "bf16"

    @property
    def images(self) -> int:
        """Images of a worker in an update, of the one that has most."""
        return -(-self.batch // self.gpus)

    @property
    def passes(self) -> int:
        """Micro-batches of a worker in an update."""
        return -(-self.images // self.micro) if self.micro else 1

    @property
    def per_pass(self) -> int:
        """Images of a pass."""
        return -(-self.images // self.passes)

    @property
    def nodes(self) -> int:
        """Nodes of eight GPUs."""
        return -(-self.gpus // NODE)

    @property
    def checkpoint_bytes(self) -> int:
        """Every state of every trained parameter, and the first EMA whole."""
        return 4 * ((3 + self.emas) * self.trained + self.parameters)

    def on(self, gpus: int, images: int | None = None) -> Self:
        """The same on another number of GPUs; with so many images for each, and as many updates as see all images."""
        if images is None:
            return replace(self, gpus=gpus)
        batch = images * gpus
        return replace(self, gpus=gpus, batch=batch, steps=-(-self.steps * self.batch // batch))
