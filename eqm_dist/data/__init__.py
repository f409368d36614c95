"""From images to the batches of any worker: sources, shards, manifest, order, loader."""
