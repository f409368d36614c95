"""Whether images were changed, or repaired, after shards were made of them.

DIR/.source    the sizes and times of change of the source's files, as one sha256, when the shards were true to them

Where these differ, the images are read and compared with the sha256 that each shard holds of its own: a copied tree has
other times and the same images.
"""

import hashlib
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from eqm_dist.data.encode import ShardTask, join_stored
from eqm_dist.data.index import ShardIndex
from eqm_dist.data.sources.image import ImageSource, LabelledImage, SkippedImage, StoredSource
from eqm_dist.storage.files import atomic_write, storage_errors

STATE_NAME = ".source"

logger = logging.getLogger(__name__)


class SourceChanges:
    """What became of a source since the shards in a directory were made of it.

    Args:
        directory: of the shards.
        source: of the images; one that stores none cannot change.
    """

    def __init__(self, directory: Path, source: ImageSource) -> None:
        self._path = directory / STATE_NAME
        self._skipped_path = directory / "report.json"
        self._source = source

    def possible(self) -> bool:
        """Whether a shard may be outdated, found without reading an image.

        Raises:
            StorageError: a file cannot be read.
        """
        return isinstance(self._source, StoredSource) and (self._files_changed() or self._some_were_skipped())

    def outdated(self, shards: Sequence[tuple[ShardTask, ShardIndex]]) -> list[ShardTask]:
        """The shards that hold other images than the source, or lack one that can be decoded now.

        Raises:
            StorageError: an image cannot be read.
        """
        if not isinstance(self._source, StoredSource):
            return []
        compare = self._files_changed()
        if compare and shards:
            logger.info("Comparing the images of %s shards with those that the shards were made of.", len(shards))
        found = [
            task for task, index in shards if (compare and self._differs(task, index)) or self._repaired(task, index)
        ]
        if found:
            logger.info("%s of %s shards are written again: their images were changed.", len(found), len(shards))
        return found

    def accept(self) -> None:
        """Record that what is in the directory is true to the source.

        Raises:
            StorageError: it cannot be written.
        """
        if isinstance(self._source, StoredSource) and self._files_changed():
            atomic_write(self._path, self._versions.encode())

    @cached_property
    def _versions(self) -> str:
        """Asked once, before an image is read: what changes later is found by the next preparation."""
        assert isinstance(self._source, StoredSource)
        return hashlib.sha256("\n".join(self._source.versions()).encode()).hexdigest()

    def _files_changed(self) -> bool:
        with storage_errors("read", self._path):
            return not self._path.exists() or self._path.read_text() != self._versions

    def _some_were_skipped(self) -> bool:
        with storage_errors("read", self._skipped_path):
            # The report is ours, and this is how it is written; without one, the shards themselves are asked.
            return not self._skipped_path.exists() or b'"skipped": 0,' not in self._skipped_path.read_bytes()

    def _differs(self, task: ShardTask, index: ShardIndex) -> bool:
        assert isinstance(self._source, StoredSource)
        # A shard of an earlier release does not say what it was made of.
        return index.source is not None and join_stored(self._source.stored(task.start, task.stop)) != index.source

    def _repaired(self, task: ShardTask, index: ShardIndex) -> bool:
        return any(self._decodes(task, image) for image in index.skipped)

    def _decodes(self, task: ShardTask, image: SkippedImage) -> bool:
        number = int(image.key) if image.key.isdecimal() else -1
        if not task.start <= number < task.stop:
            return False
        return isinstance(next(iter(self._source.read(number, number + 1))), LabelledImage)
