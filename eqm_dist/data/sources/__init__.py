"""What images come from. A source is a numbered list of labelled images that can be read from any place."""

from eqm_dist.data.sources.digits import Digits
from eqm_dist.data.sources.folder import ImageFolder
from eqm_dist.data.sources.idx import IdxImages
from eqm_dist.data.sources.image import ImageSource, LabelledImage, RawImage, RawSource, SkippedImage, StoredSource
from eqm_dist.data.sources.table import ImageTable
from eqm_dist.data.sources.tars import ImageTars

__all__ = [
    "Digits",
    "IdxImages",
    "ImageFolder",
    "ImageSource",
    "ImageTable",
    "ImageTars",
    "LabelledImage",
    "RawImage",
    "RawSource",
    "SkippedImage",
    "StoredSource",
]
