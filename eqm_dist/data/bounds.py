"""How much of anything a file of others may ask for: memory, classes, members. docs/data.md lists them for users."""

MAX_CLASSES = 1_000_000
"""A label histogram of so many classes is still small; ImageNet-21k has 21,841."""
MAX_IMAGE_BYTES = 256 << 20
"""Of one image as it is stored."""
MAX_IMAGE_PIXELS = 178_956_970
"""Of one image when it is decoded: Pillow's own limit, which a flag can raise."""
MAX_SIDE = 4096
"""Of the images that are encoded or measured."""
MAX_MOMENTS_BYTES = 1 << 30
"""Of one sample in a shard."""
MAX_TEXT_BYTES = 64 << 20
"""Of a manifest, or of another text that is read whole."""
MAX_LABEL_BYTES = 1 << 20
"""Of KEY.json in a tar."""
MAX_NAME_BYTES = 64 << 10
"""Of the extended header of a member of a tar, which holds long names."""
MAX_IDX_BYTES = 4 << 30
"""Of an IDX file when it is unpacked."""
MAX_ROWS = 100_000_000
"""Of a table."""
MAX_STATISTICS_BYTES = 2 << 30
"""Of one array in a file of statistics."""
