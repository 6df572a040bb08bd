"""The GRPO gradient that a labelled pair would give on `delta_s`.

For the group {hack: A = +1, clean: A = -1} of one prompt the GRPO loss, at ratio 1 and without its KL term, has
    D_p = -∇ log π(hack) + ∇ log π(clean)
on each module, up to Dr. GRPO's constant 1 / (2 · max_completion_length) (arXiv:2503.20783), which is left out here as
no direction depends on it. log π is the sum over the completion's tokens, end token included, of the log-probabilities
at the trainer's sampling temperature. `token_reduction="mean"` divides by the number of tokens, as earlier work did;
it favours short completions. Pairs are never cut to `max_completion_length`: half a hack is no hack.

All sides of all pairs go through the model in batches of about equal length, padded on the right, where causal
attention sees nothing of it; what each row's tokens contribute is told apart inside the one backward of a batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from loguru import logger
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from projected_grpo.adapter import DeltaSLinear, delta_s_modules, delta_s_parameters
from projected_grpo.config import TokenReduction
from projected_grpo.encoding import encode_completion, encode_prompt
from projected_grpo.errors import InputError
from projected_grpo.merged_forward import unchanging
from projected_grpo.pairs import ContrastivePair
from projected_grpo.row_grads import RowGradRecorder

BATCH_TOKENS = 2048
"""Of a batch, padding included: the logits of so many tokens, and the activations of one backward, are held at once."""


@dataclass(frozen=True)
class EncodedPair:
    """Token ids, each completion closed by the end token."""

    prompt: list[int]
    hack: list[int]
    clean: list[int]


@dataclass(frozen=True)
class _Side:
    """One completion after its prompt; `sign` is its advantage's, turned round: a loss goes down."""

    pair: int
    sign: float
    ids: list[int]
    n_prompt: int


def pair_gradients(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    *,
    temperature: float,
    token_reduction: TokenReduction = "sum",
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, Float[Tensor, "n_pairs r"]]:
    """D of every adapted module: one row a pair, in float32 (float64 for a float64 model), on the CPU.

    The model's gradients, train mode, adapters' state and every random generator are left as they were.

    Raises:
        ValueError: the model has no single active `delta_s` adapter, or it is merged or disabled.
    """
    parameters = delta_s_parameters(model)
    modules = delta_s_modules(model)
    if any(module.merged or module.disable_adapters for module in modules.values()):
        raise ValueError("the delta_s adapter is merged or disabled; unmerge or enable it first")
    names = {module: name for name, module in modules.items()}
    total = {name: p.new_zeros(len(pairs), len(p), requires_grad=False) for name, p in parameters.items()}
    with _measuring(model), torch.enable_grad(), unchanging(model):
        for batch in _batches(pairs, batch_tokens):
            owners = torch.tensor([side.pair for side in batch], device=next(model.parameters()).device)

            def add(module: DeltaSLinear, rows: Tensor, owners: Tensor = owners) -> None:
                mine = total[names[module]]
                mine.index_add_(0, owners.to(mine.device), rows.to(mine.dtype))

            with RowGradRecorder(add).attached(model):
                torch.autograd.grad(_loss(model, batch, temperature, token_reduction), list(parameters.values()))
    return {name: rows.cpu() for name, rows in total.items()}


def encode_pairs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[ContrastivePair],
    chat_template_kwargs: dict[str, Any] | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
) -> list[EncodedPair]:
    """The pairs' ids. `max_prompt_length` (tokens) and the model's context are limits that a pair must keep;
    `max_completion_length` only warns.

    Raises:
        InputError: a pair whose prompt, or prompt and completion together, are too long.
    """
    encoded = [encode_pair(tokenizer, pair, chat_template_kwargs) for pair in pairs]
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = [max(len(ids.hack), len(ids.clean)) for ids in encoded]
    for pair, ids, completion in zip(pairs, encoded, longest, strict=True):
        _check_length(pair, len(ids.prompt), completion, max_prompt_length, context)
    long = sum(completion > (max_completion_length or 10**9) for completion in longest)
    if long:
        logger.warning(
            f"{long} of {len(encoded)} pairs have a side longer than max_completion_length={max_completion_length} "
            "tokens, which the policy could not have sampled; they are used whole"
        )
    return encoded


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, pair: ContrastivePair, chat_template_kwargs: dict[str, Any] | None = None
) -> EncodedPair:
    """The ids of one pair, whatever their number."""
    prompt = encode_prompt(tokenizer, pair.prompt, chat_template_kwargs)
    return EncodedPair(prompt, encode_completion(tokenizer, pair.hack), encode_completion(tokenizer, pair.clean))


def _batches(pairs: Sequence[EncodedPair], batch_tokens: int) -> Iterator[list[_Side]]:
    """All sides, the longest first, so that what does not fit into memory fails at once."""
    sides = [
        _Side(i, sign, pair.prompt + completion, len(pair.prompt))
        for i, pair in enumerate(pairs)
        for completion, sign in ((pair.hack, -1.0), (pair.clean, 1.0))
    ]
    batch: list[_Side] = []
    for side in sorted(sides, key=lambda side: -len(side.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(side)
    if batch:
        yield batch


def _loss(
    model: nn.Module, batch: list[_Side], temperature: float, token_reduction: TokenReduction
) -> Float[Tensor, ""]:
    """Σ sign · log π over the batch's rows."""
    device = next(model.parameters()).device
    width, first = len(batch[0].ids), min(side.n_prompt for side in batch)
    ids = torch.tensor([side.ids + [0] * (width - len(side.ids)) for side in batch])
    weight = torch.zeros(len(batch), width)
    for row, side in zip(weight, batch, strict=True):
        n = len(side.ids) - side.n_prompt
        row[side.n_prompt : len(side.ids)] = side.sign if token_reduction == "sum" else side.sign / n
    ids, weight = ids.to(device), weight[:, first:].to(device)
    logits = model(input_ids=ids, logits_to_keep=width - first + 1).logits[:, :-1]
    own = weight != 0
    wide = logits[own].to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return -(F.cross_entropy(wide, ids[:, first:][own], reduction="none") * weight[own].to(wide.dtype)).sum()


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
