"""Text to token ids, exactly as TRL's GRPOTrainer does it, for everything that does not pass through its sampler:
contrastive pairs and cached teacher rollouts must look to the model like rollouts of its own."""

from typing import Any

from transformers import PreTrainedTokenizerBase

Prompt = list[dict[str, str]] | str


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat_template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """Ids of a prompt: messages through the chat template with the assistant's turn opened, a string as it stands."""
    if isinstance(prompt, str):
        return tokenizer(text=prompt)["input_ids"]
    return tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
    )["input_ids"]


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None = None) -> list[int]:
    """Ids of a completion with the end token that closes the turn; one longer than `max_length` tokens is cut, as the
    sampler would have cut it, and then has no end token."""
    ids = [*tokenizer(text=text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return ids if max_length is None else ids[:max_length]


def open_turn(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    prefill: str,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> str:
    """A prompt that ends inside the assistant's turn, as one string: the chat template, then `prefill`."""
    opened = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, **(chat_template_kwargs or {})
    )
    return opened + prefill
