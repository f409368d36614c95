"""Statistics on disk: what is saved comes back, the cache never gives what is old, published files are read safely."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eqm_dist.errors import DataError
from eqm_dist.evaluate.images import open_images
from eqm_dist.evaluate.metrics import FeatureMoments, frechet_distance
from eqm_dist.evaluate.references import cached_statistics, load_statistics, published_moments, save_statistics
from eqm_dist.evaluate.statistics import PARTS, ImageStatistics, image_statistics, parts_of
from tests.test_evaluate_statistics import Levels, assert_same, random_images


def test_saved_statistics_come_back(tmp_path: Path) -> None:
    measured = image_statistics(Levels(), [random_images(0, 9)], parts=PARTS)
    save_statistics(tmp_path / "deep" / "ours.safetensors", measured, "nine images")
    found, source = load_statistics(tmp_path / "deep" / "ours.safetensors")
    assert_same(found, measured)
    assert source == "nine images"


def test_statistics_without_a_count_come_back(tmp_path: Path) -> None:
    moments = FeatureMoments.of_gaussian(torch.zeros(3), torch.eye(3))
    save_statistics(tmp_path / "x.safetensors", ImageStatistics("given", None, {"features.moments": moments}), "them")
    assert load_statistics(tmp_path / "x.safetensors")[0].count is None


def test_what_are_no_statistics_is_refused(tmp_path: Path) -> None:
    from eqm_dist.evaluate.features import ImageClassifier, save_classifier

    (tmp_path / "classifier.safetensors").write_bytes(save_classifier(ImageClassifier((4, 4, 1), 2)))
    (tmp_path / "text.safetensors").write_text("text")
    for name in ("classifier", "text", "absent"):
        with pytest.raises(DataError, match=f"{name}.safetensors cannot be read as one"):
            load_statistics(tmp_path / f"{name}.safetensors")


def test_the_cache_gives_what_was_measured_and_never_what_is_old(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    measured: list[ImageStatistics] = []

    def statistics(extractor: nn.Module, metrics: list[str]) -> ImageStatistics:
        images = open_images(str(path))

        def measure() -> ImageStatistics:
            measured.append(image_statistics(extractor, images.read(0, len(images), 4), parts=parts_of(metrics)))
            return measured[-1]

        return cached_statistics(images, extractor, parts_of(metrics), measure, tmp_path / "cache")

    class Other(Levels):
        id = "levels, changed"

    class Unnamed(Levels):
        id: Any = None

    np.savez(path, random_images(0, 9).numpy())
    first = statistics(Levels(), ["fid"])
    assert_same(statistics(Levels(), ["fid"]), first)
    assert len(measured) == 1
    np.savez(path, random_images(1, 9).numpy())  # another content of the same name and size
    assert not torch.equal(vars(statistics(Levels(), ["fid"]).parts["features.moments"])["total"],
                           vars(first.parts["features.moments"])["total"])  # fmt: skip
    statistics(Other(), ["fid"])
    statistics(Levels(), ["fid", "kid"])
    assert len(measured) == 4
    statistics(Unnamed(), ["fid"])
    statistics(Unnamed(), ["fid"])
    assert len(measured) == 6  # nothing says when it changes
    assert len(list((tmp_path / "cache").iterdir())) == 4


class AdmLike(nn.Module):
    """Takes published statistics, as Inception does."""

    id = "adm-like"
    num_features = 4
    adm_statistics = True

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).double()


def test_published_moments_give_the_distance_of_the_images_they_are_of(tmp_path: Path) -> None:
    first, second = random_images(0, 40), random_images(1, 50)
    features = first.flatten(1).numpy().astype(np.float64)
    np.savez(tmp_path / "fid.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    published = published_moments(tmp_path / "fid.npz", AdmLike())
    assert published.keys() == {"features.moments"}
    ours, other = (
        image_statistics(AdmLike(), [images], parts=parts_of(["fid"])).parts["features.moments"]
        for images in (first, second)
    )
    assert isinstance(ours, FeatureMoments)
    assert isinstance(other, FeatureMoments)
    # Float64 throughout; the terms are about 1e4 and cancel to a distance of about 1e2.
    assert frechet_distance(published["features.moments"], other) == pytest.approx(
        frechet_distance(ours, other), rel=1e-9
    )


def test_adm_files_hold_spatial_moments_too(tmp_path: Path) -> None:
    wide = {"mu_s": np.zeros(7), "sigma_s": np.eye(7)}
    np.savez(tmp_path / "adm.npz", mu=np.zeros(4), sigma=np.eye(4), **wide, arr_0=np.zeros((1, 2, 2, 1), np.uint8))
    published = published_moments(tmp_path / "adm.npz", AdmLike())
    assert published.keys() == {"features.moments", "spatial.moments"}
    assert len(published["spatial.moments"].total) == 7
    assert published_moments(tmp_path / "adm.npz", Levels()) == {}  # they are of another extractor


def test_bad_published_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "short.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "uneven.npz", mu=np.zeros(4), sigma=np.eye(5))
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "nan.npz", mu=np.full(4, np.nan), sigma=np.eye(4))
    np.savez(tmp_path / "words.npz", mu=np.array(["a"] * 4), sigma=np.eye(4))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**9,)})
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        for array in ("mu", "sigma"):
            archive.writestr(f"{array}.npy", header.getvalue())
    for name, reason in (
        ("nan", "mean of float64 is not all finite numbers"),
        ("words", "mean of <U1 is not all finite numbers"),
        ("huge", "8,000,000,000 bytes by its header, more than 2,147,483,648"),
        ("short", "mean of 3 features, and adm-like has 4"),
        ("uneven", "do not fit"),
        ("pickled", "pickle"),
        ("text", r"must be an \.npz"),
    ):
        with pytest.raises(DataError, match=reason):
            published_moments(tmp_path / f"{name}.npz", AdmLike())
