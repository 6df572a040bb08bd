"""A saved adapter: whether it is whole, and onto the model that it was trained over."""

import json
from pathlib import Path

from peft import PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from projected_grpo.adapter import DeltaSConfig
from projected_grpo.errors import InputError


def check_adapter(folder: Path) -> None:
    """Refuse what is no whole adapter before a model is loaded, and before PEFT asks a hub for what is missing."""
    for name in ("adapter_config.json", SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise InputError(f"--adapter {folder} holds no {name}; give a finished run's adapter/ folder")
    try:
        json.loads((folder / "adapter_config.json").read_text())
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            file.keys()
    except (ValueError, SafetensorError) as error:
        raise InputError(f"--adapter {folder} is damaged ({error}); take it from its run again") from error


def with_adapter(model, adapter: Path, trainable: bool = False) -> PeftModel:
    """Raises InputError where the adapter is of another base model."""
    try:
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
    except ValueError as error:  # another base model: the adapter's own check names the module
        raise InputError(f"--adapter {adapter} does not fit --model: {error}") from error


def adapted(model, adapter: Path | None, trainable: bool = False) -> PeftModel:
    """`model` with the saved adapter, or with a fresh one at δ = 0. Raises InputError as `with_adapter` does."""
    if adapter is None:
        return get_peft_model(model, DeltaSConfig())
    return with_adapter(model, adapter, trainable)
