"""A set of generated images on disk, drawn unit by unit, so that a killed command goes on where it stopped.

    OUT/settings.json        what decides the images; another set is refused here
    OUT/000000.png ...       --format png: one file an image
    OUT/samples-00000.tar    --format tar: KEY.png and KEY.cls, a WebDataset, one tar a unit
    OUT/samples.npz          --format npz: arr_0 [N, H, W, C] uint8 and arr_1 [N] labels, as ADM's evaluation reads it
    OUT/samples.csv          index, label, nfe, complete, finite
    OUT/samples.json         written last: the settings, and what was drawn

A unit is a range of images; it is there when its record in OUT/.units is.
"""

import csv
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, assert_never, get_args

import numpy as np
from numpy.lib import format as npy
from PIL import Image
from webdataset.writer import TarWriter

from eqm_dist.data.npy import read_array, read_header
from eqm_dist.documents import mapping_from_json, read_bounded
from eqm_dist.errors import ConfigError, DataError
from eqm_dist.storage.files import atomic_write, storage_errors
from eqm_dist.storage.lease import LEASE_FILE

Format = Literal["png", "tar", "npz"]
FORMATS: tuple[Format, ...] = get_args(Format)
SETTINGS_FILE = "settings.json"
RECORD_FILE = "samples.json"
FACTS_FILE = "samples.csv"
NPZ_FILE = "samples.npz"
GRID_FILE, NFE_FILE = PICTURES = "grid.png", "nfe.png"
"""Pictures of a set that lie beside its images and are none of them."""
_UNITS = ".units"
_FACTS = "label", "nfe", "complete", "finite"


@dataclass(frozen=True)
class Unit:
    """The images [start, stop) of a set."""

    number: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"images {self.start:,} to {self.stop - 1:,}"


@dataclass(frozen=True)
class ImageSet:
    """The files of a set.

    Attributes:
        directory: where they are.
        format: one of ``FORMATS``.
        count: images in all.
        unit: images of a unit.
    """

    directory: Path
    format: Format
    count: int
    unit: int

    def units(self) -> list[Unit]:
        """All units."""
        starts = range(0, self.count, self.unit)
        return [Unit(number, start, min(start + self.unit, self.count)) for number, start in enumerate(starts)]

    def missing(self) -> list[Unit]:
        """The units that are still to be drawn."""
        return [] if self.complete() else [unit for unit in self.units() if not self._record(unit).exists()]

    def complete(self) -> bool:
        """Whether everything is there."""
        return (self.directory / RECORD_FILE).exists()

    def write(self, unit: Unit, images: np.ndarray, facts: Mapping[str, np.ndarray], precision: str) -> None:
        """Write a unit, its record last.

        Args:
            unit: which.
            images: [n, H, W, C] uint8.
            facts: [n] each: ``label``; ``nfe``, the evaluations; ``complete``, whether the sampler came to its end;
                ``finite``, whether the latents were numbers.
            precision: in which they were drawn.

        Raises:
            StorageError: a file cannot be written.
        """
        match self.format:
            case "png":
                for index, image in zip(range(unit.start, unit.stop), images, strict=True):
                    path = self.directory / f"{index:06d}.png"
                    with storage_errors("write", path):
                        path.write_bytes(_png(image))
            case "tar":
                atomic_write(self.directory / f"samples-{unit.number:05d}.tar", _tar(unit, images, facts["label"]))
            case "npz":
                content = io.BytesIO()
                np.save(content, images)
                atomic_write(self._pixels(unit), content.getbuffer())
            case _:
                assert_never(self.format)
        record = {"precision": precision, "facts": {name: values.tolist() for name, values in facts.items()}}
        atomic_write(self._record(unit), json.dumps(record).encode())

    def finish(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Join what all units left, write the record of the set, and return it.

        Raises:
            DataError: the record of a unit is damaged.
            StorageError: a file cannot be written.
        """
        units = [self._recorded(unit) for unit in self.units()]
        facts = {name: [value for unit in units for value in unit["facts"][name]] for name in _FACTS}
        lines = [",".join(["index", *facts])]
        lines += [",".join(map(str, map(int, row))) for row in zip(range(self.count), *facts.values(), strict=True)]
        atomic_write(self.directory / FACTS_FILE, ("\n".join(lines) + "\n").encode())
        if self.format == "npz":
            self._join(np.array(facts["label"]))
        nfe = facts["nfe"]
        whole = {
            **record,
            "precision": " and ".join(sorted({unit["precision"] for unit in units})),  # units of unlike machines
            "nfe": {"mean": float(np.mean(nfe)), "min": min(nfe), "max": max(nfe)},
            "cut_off": facts["complete"].count(False),
            "not_finite": facts["finite"].count(False),
            "label_histogram": np.bincount(facts["label"]).tolist(),
        }
        atomic_write(self.directory / RECORD_FILE, (json.dumps(whole, indent=1) + "\n").encode())
        shutil.rmtree(self.directory / _UNITS)
        return whole

    def nfe(self) -> list[int]:
        """The evaluations of every image of a complete set.

        Raises:
            DataError: the file is damaged.
        """
        path = self.directory / FACTS_FILE
        try:
            with storage_errors("read", path), path.open(newline="") as file:
                return [int(row["nfe"]) for row in csv.DictReader(file)]
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise DataError(f"{path} is damaged ({error!r}); delete its directory to start over.") from None

    def read(self, count: int) -> Iterator[np.ndarray]:
        """The first ``count`` images [H, W, C] of a complete set, as they were written."""
        if self.format == "npz":
            with zipfile.ZipFile(self.directory / NPZ_FILE) as archive, archive.open("arr_0.npy") as file:
                shape = read_header(file).shape
                for _ in range(min(count, shape[0])):
                    yield np.frombuffer(file.read(int(np.prod(shape[1:]))), np.uint8).reshape(shape[1:])
            return
        for unit in self.units():
            for index in range(unit.start, min(unit.stop, count)):
                yield _pixels_of(self._png_bytes(unit, index))

    def _png_bytes(self, unit: Unit, index: int) -> bytes:
        if self.format == "png":
            return (self.directory / f"{index:06d}.png").read_bytes()
        with tarfile.open(self.directory / f"samples-{unit.number:05d}.tar") as tar:
            file = tar.extractfile(f"{index:06d}.png")
            assert file is not None
            return file.read()

    def _join(self, labels: np.ndarray) -> None:
        """The ADM file from the arrays of the units, one in memory at a time."""
        path = self.directory / NPZ_FILE
        temporary = path.with_suffix(".npz.tmp")
        with storage_errors("write", path):
            with zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                    with open(self._pixels(self.units()[0]), "rb") as part:
                        shape = read_header(part).shape[1:]
                    header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *shape)}
                    npy.write_array_header_1_0(file, header)
                    for unit in self.units():
                        with open(self._pixels(unit), "rb") as part:
                            file.write(read_array(part).tobytes())
                with archive.open("arr_1.npy", "w") as file:
                    npy.write_array(file, labels)
            temporary.replace(path)

    def _recorded(self, unit: Unit) -> dict[str, Any]:
        """What ``write`` recorded of a unit: its precision, and of each fact a number for each image."""
        path, drawn = self._record(unit), unit.stop - unit.start
        try:
            with storage_errors("read", path):
                found = mapping_from_json(read_bounded(path))
            facts = found["facts"]
            if facts.keys() != set(_FACTS) or any(not _are_numbers(values, drawn) for values in facts.values()):
                raise ValueError(f"it must hold {drawn} numbers each of {', '.join(_FACTS)}")
            if not isinstance(found["precision"], str):
                raise ValueError("its precision must be a word")
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error}); delete it and run the same command again.") from None
        return found

    def _record(self, unit: Unit) -> Path:
        return self.directory / _UNITS / f"{unit.number:05d}.json"

    def _pixels(self, unit: Unit) -> Path:
        return self.directory / _UNITS / f"{unit.number:05d}.npy"


def open_image_set(directory: Path, settings: Mapping[str, Any], format: Format, count: int, unit: int) -> ImageSet:
    """Begin a set, or go on with one that was begun with the same settings.

    Args:
        directory: where it goes; made if there is none.
        settings: everything that decides the images.
        format: how they are written.
        count: images in all.
        unit: images of a unit, if the set begins now; one that was begun keeps its own.

    Raises:
        ConfigError: the directory holds other images.
        StorageError: it cannot be written.
    """
    path = directory / SETTINGS_FILE
    wanted = {**settings, "format": format, "samples": count}
    with storage_errors("create", directory / _UNITS):
        directory.mkdir(parents=True, exist_ok=True)
        if path.exists():
            unit = _resume(path, wanted)
        elif any(there.name != LEASE_FILE for there in directory.iterdir()):
            raise ConfigError(
                f"--out must be a new or an empty directory, and {directory} holds files; choose another."
            )
        else:
            atomic_write(path, (json.dumps({**wanted, "unit": unit}, indent=1) + "\n").encode())
        if not (directory / RECORD_FILE).exists():
            (directory / _UNITS).mkdir(exist_ok=True)
    return ImageSet(directory, format, count, unit)


def _resume(path: Path, wanted: Mapping[str, Any]) -> int:
    try:
        begun = mapping_from_json(read_bounded(path))
        unit = begun.pop("unit")
        if type(unit) is not int or unit < 1:
            raise ValueError(f"a unit has {str(unit)[:50]} images")
    except (ValueError, KeyError) as error:
        raise DataError(f"{path} is damaged ({error!r}); delete its directory to start over.") from None
    for key in sorted(begun.keys() | wanted.keys()):
        if begun.get(key) != wanted.get(key):
            raise ConfigError(
                f"{path.parent} was begun with {key} {begun.get(key)}, and now it is {wanted.get(key)}; keep it, or"
                " choose another --out."
            )
    return unit


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and [type(value) in (int, bool) for value in values] == [True] * count  # pyright: ignore


def _png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(content, "PNG")
    return content.getvalue()


def _pixels_of(png: bytes) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(png), formats=("PNG",)))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _tar(unit: Unit, images: np.ndarray, labels: np.ndarray) -> memoryview:
    content = io.BytesIO()
    with TarWriter(content, user="", group="", mtime=0) as tar:
        for index, image, label in zip(range(unit.start, unit.stop), images, labels, strict=True):
            tar.write({"__key__": f"{index:06d}", "png": _png(image), "cls": int(label)})
    return content.getbuffer()
