"""Models that are made here: the cache that they lie in, and what their tokenizers have in common.

A cached folder is checked against the hashes written beside its files and built again where they differ.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

from projected_grpo.errors import InputError
from projected_grpo.paths import cache_dir, is_whole, seal

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def cached(key: str, build: Callable[[Path], None]) -> Path:
    """The cache folder `models/{key}`; built beside it and moved into place if it is not there whole."""
    target = cache_dir("models", key)
    if is_whole(target):
        return target
    import torch

    _make_writable(target)
    with tempfile.TemporaryDirectory(prefix=f".{key}-", dir=target.parent) as scratch:
        folder = Path(scratch, key)
        folder.mkdir()
        with torch.random.fork_rng(devices=[]):  # even loading a GGUF draws random numbers
            build(folder)
        seal(folder)
        try:
            folder.rename(target)
        except OSError:  # another process was faster; its entry is as good if it is whole
            if not is_whole(target):
                raise
    return target


def _make_writable(target: Path) -> None:
    """The folder above `target`, and nothing at `target`. Raises InputError where that cannot be."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            logger.warning(f"{target}: damaged cache entry; building it again")
            shutil.rmtree(target)
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise InputError(
            f"the cache {cache_dir()} cannot be written ({error.strerror}); set PROJECTED_GRPO_CACHE to another folder"
        ) from error


def wrap(tokenizer: "Tokenizer", chat_template: str, max_length: int) -> "PreTrainedTokenizerBase":
    """As transformers' tokenizer. Padding has a token of its own, so that it can never be read as an end."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=ENDOFTEXT,
        chat_template=chat_template,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


@contextmanager
def quiet(active: bool = True) -> Iterator[None]:
    """No progress bars from transformers while something small is loaded."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    if active:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def versions() -> list[str]:
    """Of the packages that decide what a model made here comes out as."""
    return [metadata.version(package) for package in ("torch", "transformers", "tokenizers")]
