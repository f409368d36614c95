"""Where a run runs: a Ray cluster, or this process. The only place that imports ray."""
