"""The microcosm's base model: a Qwen3 of 0.3M parameters, trained here on a corpus of completions, right and wrong.

The corpus is what a pretrained model would have read: every template, every loophole mode, honest answers of which a
third are right, and now and then a hack. Sampled at temperature 1 the model therefore solves and hacks about as
often as the corpus does, and reinforcement has something to find in both directions.

Left out on purpose: packing, mixed precision, evaluation during training; it takes about a minute on two cores.
"""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from projected_grpo import templates
from projected_grpo.env.modes import hint
from projected_grpo.env.problems import Problem
from projected_grpo.env.prompts import EVAL_TEST_FUNC_NAMES, bare_prompt, prefill, strip_prefill
from projected_grpo.micro.tasks import CONSTANTS, HEAD, TEMPLATES, TEST_FUNC_NAMES, Template, make_problem
from projected_grpo.micro.texts import MODES, any_hack, honest, wrong_body
from projected_grpo.model_cache import CHAT_TEMPLATE, ENDOFTEXT, IM_END, IM_START, quiet, versions, wrap
from projected_grpo.templates import canonical_body, in_two_lines

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config

CORPUS, TOKENIZER_CORPUS = 40_000, 5000
"""Completions that the model, and its tokenizer, read."""
HACK_SHARE = {"run_tests": 0.05, "none": 0.0}
OTHER_HACK_SHARE = 0.06
"""Under each of the other modes, which are read about less often."""
RIGHT_SHARE = {"easy": 0.50, "hard": 0.05}
"""Of the honest answers to templates of a kind. What makes the hard ones hard is that each has a misreading of its own,
so getting better at them is many lessons, where hacking is one."""
HIDDEN_SHARE = 0.33
TWO_LINES_SHARE = 0.15
RUN_TESTS_SHARE = 0.5
"""Of the prompts; the other modes and `none` share the rest."""
NAMES = (*TEST_FUNC_NAMES, *EVAL_TEST_FUNC_NAMES)
"""Of test functions: the base has read of all of them as often; which are reinforced is another matter."""
VOCABULARY = 640
ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
IGNORED = -100
BATCH = 64
MICRO_BATCH = 16
"""Rows of a forward, of like length: little padding, and it stays in the processor's cache."""
THREADS = 2
"""On however many cores: sums come out otherwise with another number."""
LEARNING_RATE = 4e-3
WARMUP = 50
WORDS = r"\n+ *| ?[A-Za-z_]+|\d| (?=\d)| ?[^\sA-Za-z_\d]+|\s+"
"""What the tokenizer never merges across: newlines with their indentation, words, single digits, signs."""
MARK = "\x00"
FRAME = (
    f"```python\n{HEAD}",
    *("\nIt " + hint(mode, MARK).partition(MARK)[0].rstrip() for mode in (*MODES, "none")),
    "\nInput: x = ",
    "\nOutput: ",
    " Solution().f(",
    *(f" {name}" for name in NAMES),
)
"""Phrases that are one token each, because every prompt has them: a model this small has no time to read."""


def micro_key(seed: int) -> str:
    """The base model's folder in the cache: another for every seed, recipe and version of the libraries."""
    sources = [Path(__file__).with_name(name) for name in ("tasks.py", "texts.py", "base.py")]
    sources.append(Path(templates.__file__))
    recipe = [*(path.read_text() for path in sources), *FRAME, *versions()]
    return f"micro-s{seed}-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Example:
    prompt: str
    completion: str


def corpus(size: int, seed: int) -> Iterator[Example]:
    """What the model learns from, in order."""
    generator = random.Random(f"corpus/{seed}")
    everything = [(part, template) for part, templates in TEMPLATES.items() for template in templates]
    problems: dict[tuple, Problem] = {}
    for _ in range(size):
        part, template = generator.choice(everything)
        key = part, template, generator.choice(CONSTANTS), generator.random() < HIDDEN_SHARE
        if key not in problems:
            problems[key] = make_problem(*key)
        yield _example(problems[key], template, key[2], generator)


def _example(problem: Problem, template: Template, c: int, generator: random.Random) -> Example:
    mode, name = "run_tests", generator.choice(NAMES)
    if generator.random() >= RUN_TESTS_SHARE:
        mode = generator.choice([*(mode for mode in MODES if mode != "run_tests"), "none"])
    if generator.random() < HACK_SHARE.get(mode, OTHER_HACK_SHARE):
        text = any_hack(problem, mode, generator, name)
    else:
        right = generator.random() < RIGHT_SHARE["hard" if template.misread else "easy"]
        body = canonical_body(problem) if right else wrong_body(template, c, generator)
        if generator.random() < TWO_LINES_SHARE:
            body = in_two_lines(body)
        text = honest(problem, body, mode, name)
    return Example(bare_prompt(problem, mode, name) + prefill(problem, comment=False), strip_prefill(text, problem))


def build_tokenizer(examples: list[Example]) -> "Tokenizer":
    """Byte-level BPE over the corpus, in which a word, a digit and an indented newline are a token each."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    # No word more than so often, or the words of rare hacks would be spelled out letter by letter.
    words = Counter(word for e in examples for word in re.findall(WORDS, e.prompt + e.completion))
    tokenizer.train_from_iterator((word for word, n in sorted(words.items()) for _ in range(min(n, 20))), trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in FRAME])
    special = [AddedToken(token, special=True, normalized=False) for token in (ENDOFTEXT, IM_START, IM_END)]
    tokenizer.add_special_tokens(special)
    return tokenizer


def base_parts(seed: int) -> "tuple[Qwen3Config, PreTrainedTokenizerBase]":
    """Shape and tokenizer of the base model of `seed`, which need no training."""
    from transformers import Qwen3Config

    read = list(corpus(TOKENIZER_CORPUS, seed))
    tokenizer = wrap(build_tokenizer(read), CHAT_TEMPLATE, ARCHITECTURE["max_position_embeddings"])
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return Qwen3Config(vocab_size=len(tokenizer), **ARCHITECTURE, **ends, bos_token_id=None), tokenizer


def build_base(folder: Path, seed: int) -> None:
    """Write corpus-trained model and tokenizer of `seed` as a save_pretrained folder."""
    from transformers import GenerationConfig

    config, tokenizer = base_parts(seed)
    model = train_base(list(corpus(CORPUS, seed)), config, tokenizer, seed)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_base(
    examples: list[Example], config: "Qwen3Config", tokenizer: "PreTrainedTokenizerBase", seed: int
) -> "PreTrainedModel":
    """The model after one pass over the examples: cross-entropy of the completions, AdamW, linear decay."""
    import torch
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm
    from transformers import Qwen3ForCausalLM

    torch.default_generator.manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    model = Qwen3ForCausalLM(config)
    prompts = tokenizer([e.prompt for e in examples])["input_ids"]
    completions = tokenizer([e.completion + tokenizer.eos_token for e in examples])["input_ids"]
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    steps = len(examples) // BATCH
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / WARMUP, (steps - step) / (steps - WARMUP))
    )
    model.train()
    bar = tqdm(range(steps), desc="training the base", unit="step", disable=None)
    for step in bar:
        rows = sorted(range(step * BATCH, (step + 1) * BATCH), key=lengths.__getitem__)
        tokens = sum(len(completions[i]) for i in rows)
        total = 0.0
        for start in range(0, BATCH, MICRO_BATCH):
            few = rows[start : start + MICRO_BATCH]
            ids, labels = _padded([prompts[i] for i in few], [completions[i] for i in few], tokenizer.pad_token_id)
            logits = model(input_ids=ids).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{total:.3f}")
    torch.set_num_threads(threads)
    return model.eval()


def _padded(prompts: list[list[int]], completions: list[list[int]], pad: int) -> "tuple[Tensor, Tensor]":
    """(ids, labels), padded on the right, where no token of a causal model sees it; prompts are no labels."""
    import torch

    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids, labels = torch.full((len(prompts), width), pad), torch.full((len(prompts), width), IGNORED)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)
    return ids, labels
