"""What the tests read out of a run's folder."""

import gzip
import json

from safetensors.torch import load_file

from projected_grpo.steplog import read_metrics


def rows_of(config):
    """Metrics without the columns that measure the machine."""
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def rollouts_of(config):
    with gzip.open(config.run_dir / "rollouts.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def delta_of(config):
    return load_file(config.run_dir / "adapter" / "adapter_model.safetensors")
