"""The GRPO gradient that a labelled pair would give on `delta_s`.

For the group {hack: A = +1, clean: A = -1} of one prompt the GRPO loss, at ratio 1 and without its KL term, has
    D_p = -∇ log π(hack) + ∇ log π(clean)
on each module, up to Dr. GRPO's constant 1 / (2 · max_completion_length) (arXiv:2503.20783), which is left out here as
no direction depends on it. log π is the sum over the completion's tokens, end token included, of the log-probabilities
at the trainer's sampling temperature. `token_reduction="mean"` divides by the number of tokens, as earlier work did;
it favours short completions. Pairs are never cut to `max_completion_length`: half a hack is no hack.

The plain version: one backward a pair, one pair at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from loguru import logger
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from projected_grpo.adapter import delta_s_modules, delta_s_parameters
from projected_grpo.config import TokenReduction
from projected_grpo.encoding import encode_completion, encode_prompt
from projected_grpo.errors import InputError
from projected_grpo.pairs import ContrastivePair


def pair_gradients(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[ContrastivePair],
    *,
    temperature: float,
    token_reduction: TokenReduction = "sum",
    chat_template_kwargs: dict[str, Any] | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
) -> dict[str, Float[Tensor, "n_pairs r"]]:
    """D of every adapted module: one row a pair, in float32 (float64 for a float64 model), on the CPU.

    `max_prompt_length` (tokens) and the model's context are limits that a pair must keep; `max_completion_length`
    only warns. The model's gradients, train mode, adapters' state and every random generator are left as they were.

    Raises:
        InputError: a pair whose prompt, or prompt and completion together, are too long.
        ValueError: the model has no single active `delta_s` adapter, or it is merged or disabled.
    """
    parameters = delta_s_parameters(model)
    if any(module.merged or module.disable_adapters for module in delta_s_modules(model).values()):
        raise ValueError("the delta_s adapter is merged or disabled; unmerge or enable it first")
    encoded = [encode_pair(tokenizer, pair, chat_template_kwargs) for pair in pairs]
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for pair, (prompt, hack, clean) in zip(pairs, encoded, strict=True):
        _check_length(pair, len(prompt), max(len(hack), len(clean)), max_prompt_length, context)
    long = sum(max(len(h), len(c)) > (max_completion_length or 10**9) for _, h, c in encoded)
    if long:
        logger.warning(
            f"{long} of {len(encoded)} pairs have a side longer than max_completion_length={max_completion_length} "
            "tokens, which the policy could not have sampled; they are used whole"
        )
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    with _measuring(model), torch.enable_grad():
        for prompt, hack, clean in encoded:
            loss = _log_prob(model, prompt, clean, temperature, token_reduction) - _log_prob(
                model, prompt, hack, temperature, token_reduction
            )
            for name, grad in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                rows[name].append(grad.cpu())
    return {name: torch.stack(grads) for name, grads in rows.items()}


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, pair: ContrastivePair, chat_template_kwargs: dict[str, Any] | None = None
) -> tuple[list[int], list[int], list[int]]:
    """Ids of (prompt, hack, clean), each completion closed by the end token."""
    prompt = encode_prompt(tokenizer, pair.prompt, chat_template_kwargs)
    return prompt, encode_completion(tokenizer, pair.hack), encode_completion(tokenizer, pair.clean)


def _log_prob(
    model: nn.Module, prompt: list[int], completion: list[int], temperature: float, token_reduction: TokenReduction
) -> Float[Tensor, ""]:
    device = next(model.parameters()).device
    ids = torch.tensor([prompt + completion], device=device)
    logits = model(input_ids=ids, logits_to_keep=len(completion) + 1).logits[0, :-1]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    chosen = wide.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])
    return chosen.sum() if token_reduction == "sum" else chosen.mean()


def _check_length(
    pair: ContrastivePair, prompt: int, completion: int, max_prompt_length: int | None, context: int | None
) -> None:
    if max_prompt_length is not None and prompt > max_prompt_length:
        raise InputError(
            f"pair {pair.id}: its prompt alone has {prompt} tokens, over max_prompt_length={max_prompt_length}; "
            "shorten the pair's problem or raise --max-prompt-length"
        )
    if context is not None and prompt + completion > context:
        raise InputError(
            f"pair {pair.id}: prompt and completion have {prompt} + {completion} tokens, over the model's context of "
            f"{context}; shorten the pair or leave it out"
        )


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode inside (no dropout, hence no generator is touched), then every module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
