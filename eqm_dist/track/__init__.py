"""The record of a run: metrics.jsonl that is always on, MLflow, and result.json at the end."""
