"""A trained model as a directory for others: weights, config, and a card that says what it is.

OUT/model.safetensors   EMA weights under the official names
OUT/config.yaml         the config of the run
OUT/model.json          step, autoencoder, class names, sha256 of the weights
OUT/README.md           the model card
OUT/samples.png         the run's own picture at that step, if it drew one
"""

import shutil
from pathlib import Path
from typing import Any

import safetensors.torch

from eqm_dist.config import SamplerConfig, portable_config
from eqm_dist.data.manifest import read_manifest
from eqm_dist.derived import derive
from eqm_dist.documents import to_json
from eqm_dist.errors import ConfigError
from eqm_dist.evaluate.extractors import is_file_name
from eqm_dist.models.autoencoder import is_hub_id
from eqm_dist.options import to_yaml
from eqm_dist.pretrained import DESCRIPTION_FILE, WEIGHTS_FILE, Pretrained
from eqm_dist.provenance import provenance
from eqm_dist.run_directory import CONFIG_FILE, MANIFEST_FILE, METRICS_FILE, SAMPLES, picture_name
from eqm_dist.storage.files import atomic_write, storage_errors
from eqm_dist.storage.open import local_copy, open_folder
from eqm_dist.track.jsonl import read_metrics
from eqm_dist.train.engine import WEIGHT

CARD_FILE = "README.md"
PICTURE_FILE = "samples.png"


def export(model: Pretrained, out: Path, *, license: str | None = None) -> Path:
    """Write the directory; ``model.safetensors`` last, so that half an export is none.

    Args:
        model: what is exported.
        out: a new or an empty directory.
        license: SPDX id for the card; None leaves it out.

    Raises:
        CheckpointError: the weights are not those of the config.
        ConfigError: ``out`` holds files.
        StorageError: it cannot be written.
    """
    model.model  # noqa: B018 (nothing is exported that does not load)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out must be a new or an empty directory, and {out} holds files; name another.")
    with storage_errors("create", out):
        out.mkdir(parents=True, exist_ok=True)
    picture = _picture(model)
    if picture is not None:
        with storage_errors("write", out / PICTURE_FILE):
            shutil.copyfile(picture, out / PICTURE_FILE)
    # Where this machine keeps things, and who keeps its records, is nobody else's matter.
    atomic_write(out / CONFIG_FILE, to_yaml(portable_config(model.config)).encode())
    description = {
        "step": model.step,
        "autoencoder_id": model.autoencoder_id,
        "autoencoder_location": model.autoencoder_location if is_hub_id(model.autoencoder_location) else None,
        "class_names": model.class_names,
        "weights_sha256": model.sha256,
        **provenance(),
    }
    atomic_write(out / DESCRIPTION_FILE, (to_json(description, 1) + "\n").encode())
    atomic_write(out / CARD_FILE, model_card(model, license, picture is not None).encode())
    weights = {name: tensor.contiguous() for name, tensor in model.weights.items()}
    atomic_write(out / WEIGHTS_FILE, safetensors.torch.save(weights, {"format": "pt"}))
    return out


def model_card(model: Pretrained, license: str | None = None, picture: bool = False) -> str:
    """The card in Markdown, with the front matter that model hubs read."""
    metrics = _metrics(model)
    front = ["---", "library_name: eqm-dist", "tags: [equilibrium-matching, image-generation]"]
    front += [f"license: {license}"] if license else []
    objective = model.config.objective
    method = "Equilibrium Matching" if objective.kind == "eqm" else objective.kind.replace("_", " ")
    facts = {"method": method + (f" with explicit energy ({objective.energy})" * (objective.energy != "none"))}
    if objective.decay is not None:
        facts["c(gamma)"] = ", ".join(f"{k} {v}" for k, v in objective.decay.model_dump(exclude_none=True).items())
    found = derive(model.config)
    facts["parameters"] = f"{found.parameters:,} ({found.trained_parameters:,} trained)"
    if model.step is not None:
        training = model.config.train
        facts["training"] = f"{model.step:,} steps of {training.global_batch:,} images, seed {model.config.run.seed}"
    if model.state is not None:
        facts["weights"] = "no EMA" if model.state == WEIGHT else f"EMA, decay {model.state[4:]}"
    facts |= _data(model)
    facts["latents"] = f"{list(model.config.data.latent_shape)} of {model.autoencoder_id or 'an unnamed autoencoder'}"
    facts["classes"] = f"{model.config.data.num_classes:,}"
    facts["sampler"] = _sampler(model.config.sampler)
    lines = [*front, "---", "", f"# {model.name}", ""]
    lines += [f"![One row for each class]({PICTURE_FILE})", ""] if picture else []
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), ""]
    if metrics:
        lines += [
            "## Measured",
            "",
            f"At step {model.step:,}, while it trained:",
            "",
            "| metric | value |",
            "|---|---|",
        ]
        lines += [f"| {name.removeprefix('eval/')} | {value:.4g} |" for name, value in sorted(metrics.items())]
        extractor = model.refused.get("evaluation.extractor", model.config.evaluation.extractor)
        lines += ["", f"Extractor: {Path(extractor).name if is_file_name(extractor) else extractor}.", ""]
    lines += [
        "## Use", "", "```python", "import eqm_dist", "", 'model = eqm_dist.load("path/to/this/directory")',
        "images = model.sample(labels=[0], seed=0)  # [1, H, W, C] uint8", "```", "",
        "The method: Runqian Wang and Yilun Du, Equilibrium Matching: Generative Modeling with Implicit Energy-Based"
        " Models, [arXiv 2510.02300](https://arxiv.org/abs/2510.02300).", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _sampler(sampler: SamplerConfig) -> str:
    return ", ".join(f"{key} {value}" for key, value in sampler.model_dump(exclude_none=True).items())


def _metrics(model: Pretrained) -> dict[str, float]:
    """What the run measured at that very step."""
    if model.run is None:
        return {}
    lines = (line for line in read_metrics(local_copy(model.run, METRICS_FILE)) if line.get("step") == model.step)
    return {name: value for line in lines for name, value in line.items() if name.startswith("eval/")}


def _data(model: Pretrained) -> dict[str, Any]:
    if model.run is None or open_folder(model.run).size(MANIFEST_FILE) is None:
        return {}
    manifest = read_manifest(open_folder(model.run))
    return {"data": f"{manifest.source}: {manifest.num_samples:,} samples"}


def _picture(model: Pretrained) -> Path | None:
    if model.run is None or model.step is None:
        return None
    picture = local_copy(model.run, f"{SAMPLES}/{picture_name('samples', model.step)}")
    return picture if picture.is_file() else None
