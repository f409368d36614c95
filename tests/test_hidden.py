"""Optional packages that are installed but do not import, as torchvision beside a CPU build of torch."""

import importlib.util
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from eqm_dist.hidden import hidden

FAILING = "raise RuntimeError('operator torchvision::nms does not exist')"
WORKING = "class transforms: ...\nclass ops: ...\n"


def fake_package(folder: Path, name: str, source: str) -> None:
    """A package as pip installs it: a module and its metadata."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    info = folder / f"{name}-99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 99.0\n")


@pytest.mark.parametrize("source", [FAILING, WORKING])
def test_metrics_and_autoencoder_import_neither_torchvision_nor_torch_fidelity(tmp_path: Path, source: str) -> None:
    fake_package(tmp_path, "torchvision", source)
    fake_package(tmp_path, "torch_fidelity", source)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch
from eqm_dist.evaluate.metrics import half_split_fid, kernel_distance
features = torch.randn(8, 4)
half_split_fid(features, seed=0), kernel_distance(features, features, subsets=1, subset_size=4)
from eqm_dist.models.autoencoder import load_autoencoder
from tests.vae import save_tiny_vae
from pathlib import Path
load_autoencoder(str(save_tiny_vae(Path({str(tmp_path / "vae")!r}))))
print(sorted({{"torchvision", "torch_fidelity"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


def test_a_package_is_hidden_within_and_there_again_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, "hidden_example", "value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    with hidden("hidden_example"):
        assert importlib.util.find_spec("hidden_example") is None
        with pytest.raises(metadata.PackageNotFoundError):
            metadata.version("hidden-example")
        with pytest.raises(ModuleNotFoundError):
            import hidden_example  # pyright: ignore[reportMissingImports]
        assert metadata.version("torch")
    import hidden_example  # pyright: ignore[reportMissingImports]

    assert hidden_example.value == 1
    assert metadata.version("hidden-example") == "99.0"
    with hidden("hidden_example"):  # imported, so it works, and hiding it could only confuse who holds it
        assert importlib.util.find_spec("hidden_example") is not None
    monkeypatch.delitem(sys.modules, "hidden_example")
