"""The GRPO gradient that a labelled pair would give on `delta_s`.

For the group {hack: A = +1, clean: A = -1} of one prompt the GRPO loss, at ratio 1 and without its KL term, has
    D_p = -∇ log π(hack) + ∇ log π(clean)
on each module, up to Dr. GRPO's constant 1 / (2 · max_completion_length) (arXiv:2503.20783), which is left out here as
no direction depends on it. log π is the sum over the completion's tokens, end token included, of the log-probabilities
at the trainer's sampling temperature. `token_reduction="mean"` divides by the number of tokens, as earlier work did;
it favours short completions. Pairs are never cut to `max_completion_length`: half a hack is no hack.

The pairs go through the model in batches of about equal length, padded on the right, where causal attention sees
nothing of it, and what each row contributes is told apart inside the one backward of a batch. A row is a pair: its
prompt once, then both sides, neither of which attends to the other. Under a model whose attention does not take such a
mask a row is a side, after a prompt of its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
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

BATCH_TOKENS = 1024
"""Of a batch, padding included: the logits of so many tokens, and the activations of one backward, are held at once.
Half as many and twice as many are slower on a CPU (docs/performance.md); a 4B model does not fit with many more."""


@dataclass(frozen=True)
class EncodedPair:
    """Token ids, each completion closed by the end token."""

    prompt: list[int]
    hack: list[int]
    clean: list[int]


PACKABLE = ("llama", "qwen2", "qwen3")
"""Model types whose layers all attend in full and take a mask of (rows, 1, tokens, tokens) as it is."""


@dataclass(frozen=True)
class _Row:
    """A prompt and the sides after it, each with the sign of its log-probability in the loss."""

    pair: int
    prompt: list[int]
    sides: tuple[tuple[list[int], float], ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(side) for side, _ in self.sides)


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
    n_weights = sum(module.in_features * module.out_features for module in modules.values())
    total = {name: p.new_zeros(len(pairs), len(p), requires_grad=False) for name, p in parameters.items()}
    with _measuring(model), torch.enable_grad(), unchanging(model):
        for packed, rows in _batches(_rows(model, n_weights, pairs), batch_tokens):
            owners = torch.tensor([row.pair for row in rows], device=next(model.parameters()).device)

            def add(module: DeltaSLinear, grads: Tensor, owners: Tensor = owners) -> None:
                mine = total[names[module]]
                mine.index_add_(0, owners.to(mine.device), grads.to(mine.dtype))

            with RowGradRecorder(add).attached(model):
                loss = _loss(model, _collate(rows, token_reduction), packed, temperature)
                torch.autograd.grad(loss, list(parameters.values()))
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


class BatchShape(NamedTuple):
    """Sizes of one batch of pairs."""

    packed: bool
    rows: int
    width: int
    kept: int
    """Places of a row that have logits."""
    scored: int
    """Tokens of all sides."""


def batch_shapes(model: nn.Module, pairs: Sequence[EncodedPair], n_weights: int) -> list[BatchShape]:
    """Of each batch that `pair_gradients` would make of a model with `n_weights` numbers in its adapted weights."""
    shapes = []
    for packed, rows in _batches(_rows(model, n_weights, pairs), BATCH_TOKENS):
        batch = _collate(rows, "sum")
        width = batch.ids.shape[1]
        shapes.append(BatchShape(packed, len(rows), width, width - min(batch.places), len(batch.tokens)))
    return shapes


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, pair: ContrastivePair, chat_template_kwargs: dict[str, Any] | None = None
) -> EncodedPair:
    """The ids of one pair, whatever their number."""
    prompt = encode_prompt(tokenizer, pair.prompt, chat_template_kwargs)
    return EncodedPair(prompt, encode_completion(tokenizer, pair.hack), encode_completion(tokenizer, pair.clean))


def _takes_packed_rows(config: Any) -> bool:
    windowed = getattr(config, "use_sliding_window", False) or "sliding_attention" in (
        getattr(config, "layer_types", None) or ()
    )
    implementation = getattr(config, "_attn_implementation", None)
    known = getattr(config, "model_type", "") in PACKABLE
    return known and implementation in ("sdpa", "eager") and not windowed


def _packing_pays(config: Any, n_weights: int, pair: EncodedPair) -> bool:
    """Multiplications of a forward. A packed row has its prompt once, but attention under a mask cannot leave out the
    half of the scores that no token sees."""
    prompt, hack, clean = len(pair.prompt), len(pair.hack), len(pair.clean)
    tokens = prompt + hack + clean
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_score = 2 * config.num_hidden_layers * config.num_attention_heads * head
    packed = tokens * n_weights + tokens**2 * per_score
    apart = (tokens + prompt) * n_weights + ((prompt + hack) ** 2 + (prompt + clean) ** 2) / 2 * per_score
    return packed < apart


def _rows(model: nn.Module, n_weights: int, pairs: Sequence[EncodedPair]) -> Iterator[_Row]:
    packable = _takes_packed_rows(getattr(model, "config", None))
    for i, pair in enumerate(pairs):
        sides = ((pair.hack, -1.0), (pair.clean, 1.0))  # a loss goes down, so a hack's advantage of +1 is a sign of -1
        if packable and _packing_pays(model.config, n_weights, pair):
            yield _Row(i, pair.prompt, sides)
        else:
            yield from (_Row(i, pair.prompt, (side,)) for side in sides)


def _batches(rows: Iterable[_Row], batch_tokens: int) -> Iterator[tuple[bool, list[_Row]]]:
    """Rows of both sides or of one (whether it is packed), the longest first, so that what does not fit into memory
    fails at once."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: (len(row.sides), len(row)), reverse=True):
        full = batch and (len(batch) + 1) * len(batch[0]) > batch_tokens
        if full or (batch and len(row.sides) != len(batch[0].sides)):
            yield len(batch[0].sides) > 1, batch
            batch = []
        batch.append(row)
    if batch:
        yield len(batch[0].sides) > 1, batch


@dataclass(frozen=True)
class _Batch:
    ids: Int64[Tensor, "rows width"]
    positions: Int64[Tensor, "rows width"]
    segments: Int64[Tensor, "rows width"]
    """0 for a prompt, 1 and 2 for the sides, -1 for padding."""
    rows: list[int]
    """Of each token of a side."""
    places: list[int]
    """Whose logits predict it."""
    tokens: list[int]
    weights: list[float]


def _collate(rows: list[_Row], token_reduction: TokenReduction) -> _Batch:
    ids, positions = (torch.zeros(len(rows), len(rows[0]), dtype=torch.long) for _ in range(2))
    batch = _Batch(ids, positions, torch.full_like(ids, -1), [], [], [], [])
    for n, row in enumerate(rows):
        start, end = 0, len(row.prompt)
        prompt = (row.prompt, 0.0)
        for segment, (part, sign) in enumerate((prompt, *row.sides)):
            here = slice(start, start + len(part))
            begins = end if segment else 0  # both sides come after the prompt, and neither after the other
            batch.ids[n, here] = torch.tensor(part, dtype=torch.long)
            batch.positions[n, here] = begins + torch.arange(len(part))
            batch.segments[n, here] = segment
            if segment:
                batch.rows.extend([n] * len(part))
                batch.places.extend([end - 1, *range(start, start + len(part) - 1)])
                batch.tokens.extend(part)
                batch.weights.extend([sign if token_reduction == "sum" else sign / len(part)] * len(part))
            start += len(part)
    return batch


def _loss(model: nn.Module, batch: _Batch, packed: bool, temperature: float) -> Float[Tensor, ""]:
    """Σ sign · log π over the batch's sides."""
    device = next(model.parameters()).device
    first = min(batch.places)
    extra = {}
    if packed:
        mask = _mask(batch.segments.to(device), next(model.parameters()).dtype)
        extra = {"position_ids": batch.positions.to(device), "attention_mask": mask}
    kept = batch.ids.shape[1] - first
    logits = model(input_ids=batch.ids.to(device), logits_to_keep=kept, **extra).logits
    rows, places, tokens = (torch.tensor(x, device=device) for x in (batch.rows, batch.places, batch.tokens))
    wide = logits[rows, places - first].to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    weights = torch.tensor(batch.weights, dtype=wide.dtype, device=device)
    return -(F.cross_entropy(wide, tokens, reduction="none") * weights).sum()


def _mask(segments: Int64[Tensor, "rows width"], dtype: torch.dtype) -> Float[Tensor, "rows 1 width width"]:
    """What is added to the attention's scores: a token sees itself and, before it, the prompt and its own side."""
    asks, seen = segments[:, :, None], segments[:, None, :]
    sees = ((seen == 0) | (seen == asks)).tril()
    zero = torch.zeros((), dtype=dtype, device=segments.device)
    return torch.where(sees, zero, torch.finfo(dtype).min)[:, None]


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
