"""Models of random weights, made on the spot, so that everything can be tried where there is no network.

`tiny-random`, of about 0.1M parameters, is for seeing that everything runs. `qwen3-4b-random` has the real shape of
Qwen3-4B (config.json of Qwen/Qwen3-4B on the Hugging Face hub), for measuring time and memory: all of its layers are
drawn from one seed and so are equal, which makes seven decompositions do for 252 modules and changes neither. What
either of them writes means nothing.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from projected_grpo.env.problems import Problem, builtin_problems
from projected_grpo.model_cache import CHAT_TEMPLATE, ENDOFTEXT, IM_END, IM_START, quiet, wrap

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config

TINY_ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
QWEN3_4B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def _byte_level_tokenizer() -> "Tokenizer":
    """One token a byte, whose id is the byte, then the three special tokens; no merges, so nothing is ever unknown."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    # The ByteLevel components write a printable byte as its own character, the n-th of the others as chr(256 + n).
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={characters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (ENDOFTEXT, IM_START, IM_END)]
    tokenizer.add_special_tokens(special)
    return tokenizer


def tiny_parts() -> "tuple[Qwen3Config, PreTrainedTokenizerBase]":
    """Shape of `tiny-random`, and a tokenizer of one token a byte."""
    from transformers import Qwen3Config

    tokenizer = wrap(_byte_level_tokenizer(), CHAT_TEMPLATE, TINY_ARCHITECTURE["max_position_embeddings"])
    return Qwen3Config(**TINY_ARCHITECTURE, **_ends(tokenizer), bos_token_id=None), tokenizer


def _ends(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def build_tiny(folder: Path, seed: int) -> None:
    """Write `tiny-random` of a seed to `folder`: weights and tokenizer."""
    import torch
    from transformers import GenerationConfig, Qwen3ForCausalLM

    config, tokenizer = tiny_parts()
    with quiet():
        torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed would reseed the GPUs as well
        model = Qwen3ForCausalLM(config)
        model.generation_config = GenerationConfig(**_ends(tokenizer))
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def qwen3_4b_parts(dtype: str) -> "tuple[Qwen3Config, PreTrainedTokenizerBase]":
    """Qwen3-4B's shape, and a tokenizer of some three bytes a token, trained on our own problems."""
    import torch
    from tokenizers import Tokenizer
    from transformers import Qwen3Config

    tokenizer = wrap(Tokenizer.from_str(_trained_tokenizer()), CHAT_TEMPLATE, QWEN3_4B["max_position_embeddings"])
    return Qwen3Config(**QWEN3_4B, **_ends(tokenizer), bos_token_id=None, dtype=getattr(torch, dtype)), tokenizer


def build_qwen3_4b(dtype: str, device: str, seed: int) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """`qwen3-4b-random` on `device`, and its tokenizer."""
    import torch
    from transformers import GenerationConfig, Qwen3ForCausalLM

    config, tokenizer = qwen3_4b_parts(dtype)
    before = torch.get_default_dtype()
    devices = [device] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices), quiet():
        torch.manual_seed(seed)
        try:
            torch.set_default_dtype(getattr(torch, dtype))
            with torch.device(device):
                model = Qwen3ForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    first = model.model.layers[0].state_dict()
    for layer in model.model.layers[1:]:
        layer.load_state_dict(first)
    model.generation_config = GenerationConfig(**_ends(tokenizer))
    return model, tokenizer


@cache
def _trained_tokenizer() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[ENDOFTEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for part in ("train", "pairs") for problem in builtin_problems(part) for text in _texts(problem)]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _texts(problem: Problem) -> tuple[str, str]:
    return problem.question, problem.canonical_solution
