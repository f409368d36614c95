"""Trained weights from anywhere, ready to draw samples: a run, a checkpoint, an export, an official file.

model = eqm_dist.load("runs/digits")
images = model.sample(labels=[3, 1, 4])  # [3, 8, 8, 1] uint8
"""

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from eqm_dist.build import build_field, build_model, build_sampling_method, sampling_precision
from eqm_dist.config import SIZES, Config, portable_config, read_config
from eqm_dist.core.guidance import TimedField
from eqm_dist.data.loader import ShardReader
from eqm_dist.data.manifest import Manifest, read_manifest
from eqm_dist.derived import derive
from eqm_dist.documents import mapping_from_json, read_bounded
from eqm_dist.errors import CheckpointError, ConfigError, DataError
from eqm_dist.evaluate.generate import Generated, generate, warn_of_failures
from eqm_dist.models.autoencoder import Autoencoder, IdentityAutoencoder, is_hub_id, load_autoencoder, mean_latents
from eqm_dist.models.sit import SiT
from eqm_dist.models.weights import read_safetensors, read_weights
from eqm_dist.options import Layer, flatten, given, layered, with_overrides
from eqm_dist.precision import Precision
from eqm_dist.run_directory import CHECKPOINTS, CONFIG_FILE, MANIFEST_FILE, METRICS_FILE, SAMPLES, picture_name
from eqm_dist.runs import runs_location, runs_root
from eqm_dist.storage.location import Location, S3Path, to_location
from eqm_dist.storage.open import local_copy, open_folder, open_s3
from eqm_dist.train.checkpoint import MARKER, Checkpoints, contents_of, read_marker, read_whole, verify_file
from eqm_dist.train.engine import WEIGHT
from eqm_dist.train.optimizer import ema_key

WEIGHTS_FILE = "model.safetensors"
DESCRIPTION_FILE = "model.json"


@dataclass(frozen=True)
class Pretrained:
    """EMA weights with everything needed to draw images from them. Pickles.

    Attributes:
        config: of the training; ``model``, ``objective`` and ``sampler`` matter here.
        weights: the state dict.
        source: where it was loaded from.
        step: updates that made it; None if unknown.
        autoencoder_id: names the autoencoder; None if unknown.
        autoencoder_location: where that is; None for the identity.
        class_names: one for each class, or none.
        run: directory of the run it came from, or None.
        state: ``ema_DECAY`` or ``weight``; None if unknown.
        own: whether it lies among the user's own runs, so that its config is the user's word.
        refused: what the config of another model names and only the user can decide, by key.
    """

    config: Config
    weights: Mapping[str, Tensor] = field(repr=False)
    source: str
    step: int | None = None
    autoencoder_id: str | None = None
    autoencoder_location: str | None = None
    class_names: tuple[str, ...] = ()
    run: Location | None = None
    state: str | None = None
    own: bool = True
    refused: Mapping[str, str] = field(default_factory=dict)

    def sample(
        self,
        labels: Sequence[int] | Tensor,
        *,
        seed: int = 0,
        batch: int = 256,
        device: torch.device | str | None = None,
        **sampler: Any,
    ) -> Tensor:
        """Draw one image for each label.

        Args:
            labels: [n], in [0, num_classes), or num_classes for the null label.
            seed: image i depends on (weights, seed, i) alone.
            batch: images drawn at once.
            device: default a GPU if there is one.
            sampler: keys of ``sampler`` to change: ``nfe=50``, ``cfg_scale=1.5``, ...

        Returns:
            Images [n, H, W, C], uint8.

        Raises:
            ConfigError: an unknown key, or a value that cannot take effect.
            DataError: a label that the model does not know, or no autoencoder is known.
        """
        labels = torch.as_tensor(labels, dtype=torch.int64)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = self.with_sampler(**sampler) if sampler else self
        return model.generate(torch.arange(len(labels)), labels, seed, batch, device).images

    def with_sampler(self, **sampler: Any) -> "Pretrained":
        """The same weights with another sampler; keys of ``sampler``.

        Raises:
            ConfigError: an unknown key, or a value that cannot take effect.
        """
        overrides = {f"sampler.{key}": value for key, value in sampler.items()}
        changed = replace(self, config=with_overrides(self.config, overrides, "the sampler"))
        # What does not depend on the sampler, as far as it was made already.
        made = vars(self)
        vars(changed).update({name: made[name] for name in ("model", "autoencoder", "sha256") if name in made})
        return changed

    def generate(
        self,
        indices: Tensor,
        labels: Tensor,
        seed: int,
        batch: int,
        device: torch.device,
        *,
        field: TimedField | None = None,
        start: Callable[[Tensor], Tensor] | None = None,
        start_time: float = 0.0,
        many: bool = False,
    ) -> Generated:
        """The images of sample indices [n] with labels [n]: see ``evaluate.generate``; another field if given.

        ``many`` says that they are a part of thousands, so that compiling the model is worth its minute.

        Raises:
            DataError: a label that the model does not know, or no autoencoder is known.
            ConfigError: the sampler cannot follow the field.
        """
        known = self.config.data.num_classes
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= known:
            raise DataError(
                f"Labels must lie in 0..{known - 1}, or be {known} for none,"
                f" got {int(labels.min())} to {int(labels.max())}."
            )
        sampler = self.config.sampler
        drawn = generate(
            field or self.field(device, many=many),
            indices=indices.to(device),
            labels=labels.to(device),
            latent_shape=self.config.data.latent_shape,
            method=build_sampling_method(sampler),
            seed=seed,
            decode=self.autoencoder.decode,
            batch=batch,
            start=start,
            start_time=start_time,
        )
        cut_off, not_finite = int((~drawn.complete).sum()), int((~drawn.finite).sum())
        warn_of_failures(len(indices), cut_off, not_finite, sampler.nfe)
        return drawn

    def precision(self, device: torch.device) -> Precision:
        """In what arithmetic images are drawn there.

        Raises:
            ConfigError: the device does not have what ``sampler.precision`` names.
        """
        return sampling_precision(self.config, device)

    def field(self, device: torch.device | str, *, many: bool = False) -> TimedField:
        """What samplers follow: (x [B, C, h, w], labels [B], time [B]) -> [B, C, h, w], guided if so configured."""
        return build_field(self.config, self.model.to(device), self.config.data.num_classes, many=many)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, H, W, C] uint8 -> latents [B, C', h, w], the means of the autoencoder's posterior."""
        encoder = self.autoencoder
        return mean_latents(encoder.encode(images), encoder.latent_scale, encoder.latent_shift)

    def real_latents(self, shards: str | None, samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Latents [n, C, h, w] of real images, the means of their posteriors, and labels [n]: evenly over a data set.

        Args:
            shards: the data set; None for the one that the model was trained on.
            samples: n, or all if there are fewer.
            device: where the latents go.

        Raises:
            ConfigError: the model does not say what it was trained on.
            DataError: the shards are missing or of other latents.
        """
        location = shards or self.training_data("--shards")
        reader = ShardReader(location)
        manifest = reader.manifest
        if manifest.latent_shape != self.config.data.latent_shape:
            raise DataError(
                f"--shards must hold latents {list(self.config.data.latent_shape)} as the model takes, and {location}"
                f" holds {list(manifest.latent_shape)}; name others."
            )
        count = min(samples, manifest.num_samples)
        moments, labels = reader.read(np.arange(count) * manifest.num_samples // count)
        latents = mean_latents(moments[:, 0].float().to(device), manifest.latent_scale, manifest.latent_shift)
        return latents, labels

    def training_data(self, flag: str) -> str:
        """Where the data lies that it was trained on; ``flag`` is how a user names other data.

        Raises:
            ConfigError: it does not say, or is not the user's own.
        """
        if self.config.data.shards is not None:
            return self.config.data.shards
        if "data.shards" in self.refused:
            raise ConfigError(self._not_taken("data.shards", flag))
        raise ConfigError(f"{self.source} does not say what it was trained on; add {flag}.")

    def extractor(self, flag: str) -> tuple[str, str | None]:
        """The extractor of its training and the file of its weights; ``flag`` is how a user names another one.

        Raises:
            ConfigError: it is code or a file that a model of somebody else names.
        """
        if "evaluation.extractor" in self.refused:
            raise ConfigError(self._not_taken("evaluation.extractor", flag))
        return self.config.evaluation.extractor, self.config.evaluation.extractor_weights

    def _not_taken(self, key: str, flag: str) -> str:
        return (
            f"{self.source} is not among your runs, so {key}={self.refused[key]} in its config is not taken; add"
            f" {flag}, or name the directory of your runs with --run.root if it is yours."
        )

    @property
    def name(self) -> str:
        """Short, for files and pictures: the run and its step, or the file's name."""
        name = Path(self.source).stem if self.run is None else self.run.name
        return name if self.step is None else f"{name}-step{self.step}"

    @cached_property
    def model(self) -> SiT:
        """The backbone with these weights, frozen.

        Raises:
            CheckpointError: they are not of the model that the config describes.
        """
        held, named = sum(tensor.numel() for tensor in self.weights.values()), derive(self.config).parameters
        if named > held:  # nothing is allocated for what a config only claims
            raise CheckpointError(
                f"The weights in {self.source} must be those of the config beside them, which has {named:,} parameters,"
                f" and they have {held:,}; use files of one run."
            )
        model = build_model(self.config)
        try:
            model.load_state_dict(dict(self.weights))
        except RuntimeError as error:
            raise CheckpointError(
                f"The weights in {self.source} must be those of the config beside them, and are not"
                f" ({' '.join(str(error).split())[:300]}); use files of one run."
            ) from None
        return model.eval().requires_grad_(False)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """What turns latents into images, and images into latents.

        Raises:
            DataError: it is not known, or not where it was.
        """
        if self.autoencoder_id is None:
            raise DataError(
                f"{self.source} does not say which autoencoder decodes its latents; name it with autoencoder"
                " (--autoencoder): identity, a folder that diffusers wrote, or a hub id like"
                " stabilityai/sd-vae-ft-ema."
            )
        if self.autoencoder_location is None and self.autoencoder_id != IdentityAutoencoder.id:
            raise DataError(
                f"{self.source} makes latents of the autoencoder {self.autoencoder_id}, and does not say where that is;"
                " name it with autoencoder (--autoencoder): a folder that diffusers wrote, or a hub id."
            )
        if not self.own and not is_hub_id(self.autoencoder_location):
            raise DataError(
                f"{self.source} is not among your runs, so the folder {self.autoencoder_location} that it names is not"
                " read; name the autoencoder with autoencoder (--autoencoder)."
            )
        found = load_autoencoder(self.autoencoder_location, self.autoencoder_id)
        channels, known = self.config.data.latent_shape[0], getattr(found, "latent_channels", None)
        if known not in (None, channels):
            raise DataError(
                f"The autoencoder {found.id} has latents of {known} channels, and the model in {self.source} makes"
                f" {channels}; name the one that it was trained with (--autoencoder)."
            )
        return found

    def require_pictures(self) -> None:
        """Fail now, and not after the work, where its images could not be written as pictures.

        Raises:
            DataError: they are not grey or RGB, or no autoencoder is known.
        """
        channels = self.config.data.latent_shape[0]
        if self.autoencoder.id == IdentityAutoencoder.id and channels not in (1, 3):
            raise DataError(
                f"Pictures are grey or RGB, and the model in {self.source} makes {channels} channels that no"
                " autoencoder decodes; name its autoencoder with --autoencoder."
            )

    @cached_property
    def sha256(self) -> str:
        """Names the weights, whatever file they came from."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            tensor = self.weights[name]
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def load(
    location: str | Location | None = None,
    *,
    autoencoder: str | None = None,
    ema: float | Literal["none"] | None = None,
    overrides: Mapping[str, Any] | Sequence[Layer] = (),
    root: str | Location | None = None,
) -> Pretrained:
    """Load EMA weights. Nothing in the files is executed.

    A model in the directory of your runs is yours. Of any other, its config decides the model, the objective and the
    sampler, and nothing else: no extractor but digits and inception, no data, no tracking, no paths.

    Args:
        location: a run directory (its newest whole checkpoint) or a checkpoint, here or on s3://; a directory of
            ``pipelines/export.py``; or a file of weights under the official names: ``.pt`` of the official EqM or SiT
            code, or ``.safetensors``. Of a file, sizes are read off the weights. None for the newest run in ``root``.
        autoencoder: what decodes the latents, where the files do not say, or another place for it: ``identity``, a
            folder that diffusers wrote, or a hub id.
        ema: of a run or checkpoint, another of ``optimizer.ema_decays`` than the first, or "none" for the weights
            as they are.
        overrides: config keys to change, such as ``{"objective.kind": "flow_matching"}`` for a SiT file; or several
            layers of them (``options.layered``).
        root: the directory of your runs; default runs/ here.

    Raises:
        CheckpointError: there is nothing to load there, or it is damaged.
        ConfigError: an override that cannot be.
    """
    runs = runs_location(None if root is None else str(root))
    path = newest_run(runs) if location is None else to_location(location)
    own = is_own(path, runs)
    layers = [(overrides, "the overrides")] if isinstance(overrides, Mapping) else list(overrides)
    if isinstance(path, S3Path):
        loaded = _checkpoint(_on_s3(path), ema, layers, own)
        return loaded if autoencoder is None else _with_autoencoder(loaded, autoencoder)
    if ema is not None and (path.is_file() or (path / WEIGHTS_FILE).exists()):
        raise ConfigError(f"Only runs and checkpoints hold several EMAs, and {path} is neither; leave out ema.")
    if path.is_file():
        loaded = _file(path, layers)
    elif (path / WEIGHTS_FILE).exists():
        loaded = _export(path, layers, own)
    elif (path / MARKER).exists():
        loaded = _checkpoint(path, ema, layers, own)
    elif latest := Checkpoints(path / CHECKPOINTS, keep=1).latest():
        loaded = _checkpoint(latest, ema, layers, own)
    else:
        raise CheckpointError(
            "A model must be a run directory with a whole checkpoint, a checkpoint, a directory of pipelines/export.py"
            f" or a file of weights, and {path} {'is none of these' if path.exists() else 'does not exist'};"
            " correct the path, or train one with `make train`."
        )
    return loaded if autoencoder is None else _with_autoencoder(loaded, autoencoder)


def _with_autoencoder(loaded: Pretrained, autoencoder: str) -> Pretrained:
    found = load_autoencoder(None if autoencoder == "identity" else autoencoder)
    return replace(loaded, autoencoder_id=found.id, autoencoder_location=found.location)


def _on_s3(path: S3Path) -> S3Path:
    """The checkpoint that is meant: itself, or the newest of a run."""
    if open_s3(path).size(MARKER) is not None:
        return path
    latest = Checkpoints(path / CHECKPOINTS, keep=1).latest()
    if latest is None:
        raise CheckpointError(
            f"A model on S3 must be a run with a whole checkpoint, or a checkpoint, and {path} is neither; correct the"
            " URL, or copy an export or a file of weights here first."
        )
    return latest


def is_own(path: Location, runs: Location) -> bool:
    """Whether what lies there is the user's own: in the directory of the runs, by its name or where links lead."""
    if isinstance(path, S3Path) or isinstance(runs, S3Path):
        return isinstance(path, S3Path) and path.is_relative_to(runs)
    return Path(os.path.normpath(path)).is_relative_to(runs) or _real(path).is_relative_to(_real(runs))


def _real(path: Path) -> Path:
    """Where links lead; of a loop of links, as ``Path.resolve`` does not, some path."""
    return Path(os.path.realpath(path))


def _within(place: Location, own: bool, *names: str | PurePath) -> None:
    """Refuse files of somebody else's model that are none, or that a link leads out of its directory for.

    Raises:
        CheckpointError: there is one.
    """
    if own or isinstance(place, S3Path):  # which has no links
        return
    root = _real(place)
    # In the cache of the hub a snapshot is made of links to the blobs of its repository.
    roots = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    for name in names:
        found = _real(place / name)
        if not any(found.is_relative_to(each) for each in roots) or (found.exists() and not found.is_file()):
            raise CheckpointError(
                f"The files of a model from elsewhere must lie in its directory, and {place / name} is a link out of it"
                f" or no file; replace it by a file."
            )


def newest_run(root: Location | None = None) -> Path:
    """The run in ``root``, by default runs/ here, that was saved last: what commands take by default.

    Raises:
        CheckpointError: there is none, or the runs are on S3, which is not searched.
    """
    root = root or runs_root()
    if isinstance(root, S3Path):
        raise CheckpointError(f"Which run of {root} is the newest is not looked for on S3; name the run.")
    runs = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    markers = [latest / MARKER for run in runs if (latest := Checkpoints(run / CHECKPOINTS, keep=1).latest())]
    if not markers:
        raise CheckpointError(f"There is no run with a checkpoint in {root}; train one with `make train`.")
    return max(markers, key=lambda marker: marker.stat().st_mtime).parents[2]


def _checkpoint(path: Location, ema: float | Literal["none"] | None, layers: Sequence[Layer], own: bool) -> Pretrained:
    run = path.parent.parent if path.parent.name == CHECKPOINTS else None  # else a copy that stands alone
    place = run or path
    _within(place, own, (path / MARKER).relative_to(place))
    marker = read_marker(path)
    _within(place, own, *((path / name).relative_to(place) for name in marker["files"]))
    contents_of(path, marker)
    verify_file(path, CONFIG_FILE, marker)
    config, refused = _config(local_copy(path, CONFIG_FILE), layers, own)
    state = WEIGHT if ema == "none" else ema_key(ema or config.optimizer.ema_decays[0])
    manifest = None
    if run is not None:
        _within(run, own, MANIFEST_FILE, METRICS_FILE, f"{SAMPLES}/{picture_name('samples', marker['step'])}")
        folder = open_folder(run)
        manifest = read_manifest(folder) if folder.size(MANIFEST_FILE) is not None else None
    return Pretrained(
        config=config,
        weights=read_whole(path, None if ema is None else state),
        source=str(path),
        step=marker["step"],
        state=state,
        run=run,
        own=own,
        refused=refused,
        **_of_manifest(manifest),
    )


def _of_manifest(manifest: Manifest | None) -> dict[str, Any]:
    if manifest is None:
        return {}
    return {
        "autoencoder_id": manifest.autoencoder,
        "autoencoder_location": manifest.autoencoder_location,
        "class_names": manifest.class_names,
    }


def _export(path: Path, layers: Sequence[Layer], own: bool) -> Pretrained:
    _within(path, own, DESCRIPTION_FILE, CONFIG_FILE, WEIGHTS_FILE)
    try:
        description = mapping_from_json(read_bounded(path / DESCRIPTION_FILE))
        fields = {name: description[name] for name in ("step", "autoencoder_id", "autoencoder_location")}
        names = tuple(description["class_names"])
        kinds = {"step": int, "autoencoder_id": str, "autoencoder_location": str}
        wrong = [name for name, value in fields.items() if value is not None and type(value) is not kinds[name]]
        if wrong or not all(isinstance(name, str) and name.isprintable() for name in names):
            raise ValueError(f"{wrong[0] if wrong else 'a class name'} is of another kind")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / DESCRIPTION_FILE} must be the file that pipelines/export.py wrote, and cannot be read as one"
            f" ({error!r}); export again."
        ) from None
    config, refused = _config(path / CONFIG_FILE, layers, own)
    return Pretrained(
        config=config,
        weights=read_safetensors(path / WEIGHTS_FILE),
        source=str(path),
        class_names=names,
        own=own,
        refused=refused,
        **fields,
    )


def _config(path: Path, layers: Sequence[Layer], own: bool) -> tuple[Config, dict[str, str]]:
    """The config of a model, and what it names that is not taken from the model of somebody else."""
    config, refused = read_config(path), dict[str, str]()
    if not own:
        portable = portable_config(config)
        named = {"evaluation.extractor": config.evaluation.extractor, "data.shards": config.data.shards}
        taken = {"evaluation.extractor": portable.evaluation.extractor, "data.shards": None}
        said = {key for layer, _ in layers for key in flatten(layer, Config)}
        refused = {key: value for key, value in named.items() if value not in (None, taken[key]) and key not in said}
        config = portable
    return layered(Config, (given(config), str(path)), *layers), refused


def _file(path: Path, layers: Sequence[Layer]) -> Pretrained:
    """Bare weights under the official names; of the official ``.pt`` the EMA."""
    weights = read_weights(path)
    return Pretrained(config=_config_of(weights, layers, path), weights=weights, source=str(path))


def _config_of(weights: Mapping[str, Tensor], layers: Sequence[Layer], path: Path) -> Config:
    """Sizes as the weights have them; heads cannot be read off, so they are those of the official size."""
    try:
        hidden_size, channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
        side = math.isqrt(weights["pos_embed"].shape[1]) * patch_size
        num_classes = weights["y_embedder.embedding_table.weight"].shape[0] - 1
        outputs = weights["final_layer.linear.weight"].shape[0] // patch_size**2
        blocks = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
        depth = len(blocks)
        if blocks != set(range(depth)):  # a name alone must not make a model of 200,000 blocks
            raise ValueError(f"its {depth:,} blocks have numbers up to {max(blocks):,}")
    except (LookupError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path} must hold the weights of a SiT backbone under the official names, and does not ({error!r});"
            " use a checkpoint of EqM or SiT."
        ) from None
    sizes = {(size.hidden_size, size.depth): size.num_heads for size in SIZES.values()}
    heads = sizes.get((hidden_size, depth))
    if heads is None and not any("model.num_heads" in layer for layer, _ in layers):
        raise ConfigError(
            f"The number of heads cannot be read off weights, and {path} has no official size ({hidden_size} wide,"
            f" {depth} deep); give model.num_heads."
        )
    values = {
        "data": {"latent_shape": [channels, side, side], "num_classes": num_classes},
        "model": {
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "depth": depth,
            **({"num_heads": heads} if heads else {}),
            "learn_sigma": outputs == 2 * channels,
            "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        },
    }
    return layered(Config, (values, str(path)), *layers)
