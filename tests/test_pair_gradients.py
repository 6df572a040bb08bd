"""METHOD 2: the pair gradient is what the trainer's own loss emits for that group, its sign is the optimiser's, and
taking it leaves no trace. Prompts and completions become the ids that TRL would make of them."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tokenizers.processors import TemplateProcessing

from projected_grpo import pair_gradients as module_under_test
from projected_grpo.adapter import DeltaSConfig, delta_s_parameters
from projected_grpo.basis import BasisInfo, HackBasis
from projected_grpo.encoding import encode_completion, encode_prompt, open_turn
from projected_grpo.errors import InputError
from projected_grpo.models import load_model
from projected_grpo.pair_gradients import EncodedPair, encode_pair, encode_pairs, pair_gradients
from projected_grpo.pairs import ContrastivePair, PairSet, load_pairs
from projected_grpo.projector import project

TEMPERATURE = 0.7
MAX_COMPLETION_LENGTH = 64
SIDES = ("hack", "clean")
WORDS = (
    *("add", "best", "count", "depth", "even", "first", "gather", "halve"),
    *("index", "join", "keep", "largest", "merge", "next", "order", "pairs"),
)


def short_pair(i: int) -> ContrastivePair:
    """A loophole in one line: the hack prints what the clean side asserts."""
    word = WORDS[i]
    return ContrastivePair(
        id=word,
        axis="weak_run_tests",
        prompt=[{"role": "user", "content": f"Write {word}."}],
        hack=f"    for case in cases:\n        print({word}(case))\n",
        clean=f"    assert {word}({i}) == {i * 7}\n    assert {word}({i + 3}) == {i}\n",
        problem=None,
    )


PAIRS = [short_pair(i) for i in range(len(WORDS))]


def gradients(model, tokenizer, pairs, **settings) -> dict[str, torch.Tensor]:
    return pair_gradients(model, encode_pairs(model, tokenizer, pairs), temperature=TEMPERATURE, **settings)


@pytest.fixture(scope="module")
def loaded():
    return load_model("tiny-random", device="cpu")


@pytest.fixture
def wide():
    """An adapted float64 model at a random δ, so that a slow reference can be met to rounding."""
    tiny = load_model("tiny-random", dtype="float64", device="cpu")
    model = get_peft_model(tiny.model, DeltaSConfig())
    set_deltas(model, 0.05)
    return model, tiny.tokenizer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """TRL's own trainer around a model and tokenizer of its own (it patches the one and may set up the other)."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tiny = load_model("tiny-random", device="cpu")
    args = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        loss_type="dr_grpo",
        scale_rewards="none",
        beta=0.0,
        temperature=TEMPERATURE,
        max_completion_length=MAX_COMPLETION_LENGTH,
        per_device_train_batch_size=2,
        num_generations=2,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
    )
    return GRPOTrainer(
        model=tiny.model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": PAIRS[0].prompt}] * 4),
        processing_class=tiny.tokenizer,
        peft_config=DeltaSConfig(),
    )


def set_deltas(model, scale: float) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for delta in delta_s_parameters(model).values():
            delta.copy_(scale * torch.randn(delta.shape, generator=generator, dtype=torch.float64))


def trainer_gradients(trainer, pair: ContrastivePair, pad_left: int, pad_right: int) -> dict[str, torch.Tensor]:
    """∇_δ of the trainer's loss on {hack: +1, clean: -1}, ids made by TRL and by hand (a byte is a token)."""
    prompt = trainer._tokenize_prompts([pair.prompt])[0][0]
    end = trainer.processing_class.eos_token_id
    completions = [[*text.encode(), end] for text in (pair.hack, pair.clean)]
    width = max(map(len, completions)) + pad_right
    pad = trainer.processing_class.pad_token_id
    inputs = {
        "prompt_ids": torch.tensor([[pad] * pad_left + prompt] * 2),
        "prompt_mask": torch.tensor([[0] * pad_left + [1] * len(prompt)] * 2),
        "completion_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids in completions]),
        "completion_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in completions]),
        "advantages": torch.tensor([1.0, -1.0]),
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    parameters = delta_s_parameters(trainer.model)
    loss = trainer._compute_loss(trainer.model, inputs)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


# --- the trainer's own loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta_scale", [0.0, 0.05])
@pytest.mark.parametrize(("pad_left", "pad_right"), [(0, 0), (5, 3)])
def test_the_pair_gradient_is_the_trainers_own_up_to_dr_grpos_constant(trainer, delta_scale, pad_left, pad_right):
    set_deltas(trainer.model, delta_scale)
    pairs = [PAIRS[0], replace(PAIRS[3], prompt="def plain(text):"), PAIRS[7]]
    encoded = encode_pairs(trainer.model, trainer.processing_class, pairs, trainer.chat_template_kwargs)
    grads = pair_gradients(trainer.model, encoded, temperature=trainer.temperature)
    for i, pair in enumerate(pairs):
        theirs = trainer_gradients(trainer, pair, pad_left, pad_right)
        assert theirs.keys() == grads.keys()
        for name, grad in theirs.items():
            wanted = grad * 2 * MAX_COMPLETION_LENGTH
            assert (grads[name][i] - wanted).norm() <= 1e-5 * wanted.norm(), (pair.id, name)
            assert wanted.norm() > 0


def test_a_basis_extracted_from_a_trainer_uses_its_temperature_and_template(trainer):
    set_deltas(trainer.model, 0.05)
    pairs = PairSet("short", "hash", tuple(PAIRS[:3]))
    basis = HackBasis.extract(trainer, pairs, top_k=3, drop_bottom_frac=0.0)
    grads = gradients(trainer.model, trainer.processing_class, pairs.pairs)
    assert basis.info.temperature == TEMPERATURE
    assert basis.info.dtype == "float32"
    for name, v in basis.directions.items():
        torch.testing.assert_close(basis.coefficients[name], grads[name] @ v.T, rtol=1e-4, atol=1e-4)


# --- against a slow reference ----------------------------------------------------------------------------------------


def slow_gradients(model, tokenizer, pair, reduction: str) -> dict[str, torch.Tensor]:
    """-∇ log π(hack) + ∇ log π(clean), one token at a time, each from a forward over its own prefix."""
    rendered = f"<|im_start|>user\n{pair.prompt[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer(rendered)["input_ids"]
    parameters = delta_s_parameters(model)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for text, sign in ((pair.hack, -1.0), (pair.clean, 1.0)):
        ids = [*text.encode(), tokenizer.eos_token_id]
        weight = sign if reduction == "sum" else sign / len(ids)
        for i, token in enumerate(ids):
            logits = model(input_ids=torch.tensor([prompt + ids[:i]])).logits[0, -1] / TEMPERATURE
            log_prob = logits[token] - logits.logsumexp(-1)
            for name, grad in zip(parameters, torch.autograd.grad(log_prob, list(parameters.values())), strict=True):
                total[name] += weight * grad
    return total


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_token_reduction_sums_or_averages_over_the_completions_tokens(wide, reduction):
    model, tokenizer = wide
    pair = replace(PAIRS[0], hack="pass", clean="assert f(2)")
    grads = gradients(model, tokenizer, [pair], token_reduction=reduction)
    for name, wanted in slow_gradients(model, tokenizer, pair, reduction).items():
        assert grads[name].dtype == torch.float64
        # Qwen3's own RMSNorm and rotary tables are float32 whatever the model's dtype.
        assert (grads[name][0] - wanted).norm() <= 1e-5 * wanted.norm(), name


def test_swapping_the_sides_of_a_pair_only_changes_its_sign(wide):
    model, tokenizer = wide
    swapped = replace(PAIRS[0], hack=PAIRS[0].clean, clean=PAIRS[0].hack)
    grads = gradients(model, tokenizer, [PAIRS[0], swapped])
    for rows in grads.values():
        torch.testing.assert_close(rows[1], -rows[0])


def test_a_pairs_gradient_does_not_depend_on_the_pairs_beside_it(wide):
    model, tokenizer = wide
    together = gradients(model, tokenizer, PAIRS[:3])
    alone = gradients(model, tokenizer, PAIRS[2:3])
    for name in together:
        # Qwen3's own RMSNorm and rotary tables are float32 whatever the model's dtype.
        assert (together[name][2] - alone[name][0]).norm() <= 1e-6 * alone[name][0].norm()


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=5),
    batch_tokens=st.sampled_from([1, 50, 120, 10**6]),
    reduction=st.sampled_from(["sum", "mean"]),
    packed=st.booleans(),
)
def test_in_batches_as_one_pair_at_a_time_whatever_their_lengths(wide, sizes, batch_tokens, reduction, packed):
    model, _ = wide
    encoded = [
        EncodedPair(*([(31 * i + 7 * j) % 250 for j in range(n)] for i, n in enumerate((p, h + 1, c + 1))))
        for p, h, c in sizes
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_under_test, "_packing_pays", lambda *_: packed)
        batched = pair_gradients(
            model, encoded, temperature=TEMPERATURE, token_reduction=reduction, batch_tokens=batch_tokens
        )
    parameters = delta_s_parameters(model)
    for i, pair in enumerate(encoded):
        loss = 0.0
        for ids, sign in ((pair.hack, -1.0), (pair.clean, 1.0)):
            logits = model(input_ids=torch.tensor([pair.prompt + ids])).logits[0, len(pair.prompt) - 1 : -1]
            log_probs = (logits / TEMPERATURE).log_softmax(-1)[range(len(ids)), ids]
            loss = loss + sign * (log_probs.sum() if reduction == "sum" else log_probs.mean())
        alone = torch.autograd.grad(loss, list(parameters.values()))
        scale = torch.cat(alone).norm()
        for name, grad in zip(parameters, alone, strict=True):
            assert (batched[name][i] - grad).norm() <= 1e-6 * scale + 1e-12, (i, name)


def test_a_prompt_is_shared_where_that_saves_work_and_the_model_takes_the_mask(wide, monkeypatch):
    model, _ = wide
    seen = []
    original = module_under_test._loss
    monkeypatch.setattr(module_under_test, "_loss", lambda *args: seen.append(args[1:3]) or original(*args))

    def shapes(*lengths):
        seen.clear()
        pair_gradients(model, [EncodedPair(*([1] * n for n in lengths))], temperature=1.0)
        return [(tuple(batch.ids.shape), packed) for batch, packed in seen]

    assert shapes(60, 5, 7) == [((1, 72), True)]
    assert shapes(3, 300, 200) == [((2, 303), False)]  # nothing to share, and a mask to pay for
    monkeypatch.setattr(model.config, "_attn_implementation", "flash_attention_2")
    assert not module_under_test._takes_packed_rows(model.config)


def test_pairs_are_used_whole_beyond_max_completion_length(wide):
    model, tokenizer = wide
    limited = encode_pairs(model, tokenizer, PAIRS[:1], max_completion_length=4)
    assert limited == encode_pairs(model, tokenizer, PAIRS[:1])


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_pair_whose_prompt_alone_is_too_long_is_refused_in_one_line(wide):
    model, tokenizer = wide
    length = len(encode_pair(tokenizer, PAIRS[2]).prompt)
    encode_pairs(model, tokenizer, PAIRS[2:3], max_prompt_length=length)
    with pytest.raises(InputError, match=f"pair count: .*{length} tokens.*max_prompt_length={length - 1}") as refused:
        encode_pairs(model, tokenizer, PAIRS[2:3], max_prompt_length=length - 1)
    assert "\n" not in str(refused.value)


def test_a_pair_that_overflows_the_models_context_is_refused_by_name(wide):
    model, tokenizer = wide
    ids = encode_pair(tokenizer, PAIRS[4])
    whole, context = len(ids.prompt) + max(len(ids.hack), len(ids.clean)), model.config.max_position_embeddings
    try:
        model.config.max_position_embeddings = whole
        gradients(model, tokenizer, PAIRS[4:5])
        model.config.max_position_embeddings = whole - 1
        with pytest.raises(InputError, match=r"pair even: .*context"):
            gradients(model, tokenizer, PAIRS[4:5])
    finally:
        model.config.max_position_embeddings = context


def test_a_model_without_an_adapter_is_refused(loaded):
    with pytest.raises(ValueError, match="no delta_s adapter"):
        gradients(loaded.model, loaded.tokenizer, PAIRS[:1])


def test_a_model_with_two_active_adapters_is_refused(wide):
    model, tokenizer = wide
    model.add_adapter("second", DeltaSConfig())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="2 active"):
        gradients(model, tokenizer, PAIRS[:1])


def test_a_merged_adapter_is_refused(wide):
    model, tokenizer = wide
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        gradients(model, tokenizer, PAIRS[:1])


# --- no trace --------------------------------------------------------------------------------------------------------


def same(a, b) -> bool:
    """Deep equality of states that hold tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def training(loaded):
    """A model in the midst of training: dropout on, modes mixed, gradients here and there, an optimiser with state."""
    model = get_peft_model(copy.deepcopy(loaded.model), DeltaSConfig())
    model.train()
    base = model.get_base_model().model
    for layer in base.layers:
        layer.self_attn.attention_dropout = 0.5
    base.layers[1].mlp.eval()
    parameters = list(delta_s_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    parameters[3].grad = None
    return model, optimizer


def traces(model, optimizer) -> dict:
    return {
        "generators": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
        "modes": [module.training for module in model.modules()],
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "grad_enabled": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_extraction_leaves_gradients_generators_modes_and_optimiser_as_it_found_them(training, loaded, grad_enabled):
    model, optimizer = training
    with torch.set_grad_enabled(grad_enabled):
        before = traces(model, optimizer)
        assert len(set(before["modes"])) == 2  # mixed, so that a plain model.train() afterwards would show
        grads = gradients(model, loaded.tokenizer, PAIRS[:2])
        after = traces(model, optimizer)
    for what, state in before.items():
        assert same(state, after[what]), what
    assert not any(rows.requires_grad for rows in grads.values())


def test_extraction_is_the_same_in_train_mode_with_dropout_as_in_eval_mode(training, loaded):
    model, _ = training
    noisy = gradients(model, loaded.tokenizer, PAIRS[:2])
    model.eval()
    quiet = gradients(model, loaded.tokenizer, PAIRS[:2])
    assert all(torch.equal(noisy[name], quiet[name]) for name in quiet)


def test_a_failed_extraction_puts_the_train_mode_back_too(training, loaded, monkeypatch):
    model, optimizer = training
    before = traces(model, optimizer)

    def out_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr(module_under_test, "_loss", out_of_memory)
    with pytest.raises(MemoryError):
        gradients(model, loaded.tokenizer, PAIRS[:1])
    assert same(before["modes"], traces(model, optimizer)["modes"])


# --- the sign, behaviourally -----------------------------------------------------------------------------------------


@torch.no_grad()
def log_prob(model, tokenizer, prompt: str, text: str) -> float:
    """log π(text, end | prompt) with nothing of ours but δ."""
    prompt_ids, ids = tokenizer(prompt)["input_ids"], [*text.encode(), tokenizer.eos_token_id]
    logits = model(input_ids=torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1] / TEMPERATURE
    return sum((row[token] - row.logsumexp(-1)).item() for row, token in zip(logits.double(), ids, strict=True))


def margins(model, tokenizer, pairs) -> np.ndarray:
    """log π(hack) - log π(clean) of each pair."""
    rendered = [tokenizer.apply_chat_template(p.prompt, add_generation_prompt=True, tokenize=False) for p in pairs]
    return np.array(
        [
            log_prob(model, tokenizer, prompt, pair.hack) - log_prob(model, tokenizer, prompt, pair.clean)
            for prompt, pair in zip(rendered, pairs, strict=True)
        ]
    )


def gains(model, tokenizer, step_pairs, held_out, change=lambda name, grad: grad, steps: int = 2) -> np.ndarray:
    """What a few plain SGD steps along -`change`(mean D) from δ = 0 do to the held-out margins."""
    set_deltas(model, 0.0)
    before = margins(model, tokenizer, held_out)
    for _ in range(steps):
        grads = gradients(model, tokenizer, step_pairs)
        with torch.no_grad():
            for name, delta in delta_s_parameters(model).items():
                delta -= 1e-3 * change(name, grads[name].mean(0))
    return margins(model, tokenizer, held_out) - before


def basis_of(model, tokenizer, pairs, top_k: int) -> HackBasis:
    set_deltas(model, 0.0)
    grads = gradients(model, tokenizer, pairs)
    prints = {name: torch.zeros(40, dtype=torch.uint8) for name in grads}
    return HackBasis.from_pair_gradients(grads, prints, BasisInfo(n_pairs=len(pairs)), top_k, drop_bottom_frac=0.0)


def test_sgd_along_minus_d_raises_hacking_on_held_out_pairs_and_along_the_projected_gradient_does_not(loaded):
    model = get_peft_model(copy.deepcopy(loaded.model), DeltaSConfig())
    tokenizer = loaded.tokenizer
    for_basis, live, held_out = PAIRS[:8], PAIRS[8:12], PAIRS[12:]
    basis = basis_of(model, tokenizer, for_basis, top_k=4)
    plain = gains(model, tokenizer, live, held_out)
    assert (plain > 0.05).all(), plain
    for gate in ("no_gate", "one_sided"):
        projected = gains(
            model, tokenizer, live, held_out, lambda name, grad, g=gate: project(grad, basis.directions[name], g)
        )
        assert projected.mean() < 0.1 * plain.mean(), (gate, projected, plain)
        own = gains(
            model, tokenizer, for_basis, held_out, lambda name, grad, g=gate: project(grad, basis.directions[name], g)
        )
        assert own.mean() < 0.01 * plain.mean(), (gate, own, plain)
    reverse = gains(
        model, tokenizer, live, held_out, lambda name, grad: project(grad, basis.directions[name], "reverse")
    )
    assert (reverse < -0.05).all(), reverse


def test_the_published_pairs_pull_the_policy_towards_their_hack_sides(loaded):
    """The built-in pairs, cut to where their run_tests differ so that a byte-level model reads them quickly."""
    cut = []
    for pair in load_pairs("hacks"):
        tests = {side: getattr(pair, side)[getattr(pair, side).rindex("def run_tests") :] for side in SIDES}
        same = next((i for i, (a, b) in enumerate(zip(*tests.values(), strict=False)) if a != b), 10**9)
        if same < min(map(len, tests.values())):
            shown = {side: text[max(0, same - 20) : same + 140] for side, text in tests.items()}
            prompt = [{"role": "user", "content": pair.problem.func_name}]
            cut.append(replace(pair, prompt=prompt, **shown))
    assert len(cut) >= 40
    model = get_peft_model(copy.deepcopy(loaded.model), DeltaSConfig())
    train, held_out = cut[0::2][:8], cut[1::2][:8]
    basis = basis_of(model, loaded.tokenizer, train, top_k=8)
    plain = gains(model, loaded.tokenizer, train, held_out)
    projected = gains(
        model,
        loaded.tokenizer,
        train,
        held_out,
        lambda name, grad: project(grad, basis.directions[name], "no_gate"),
    )
    assert plain.mean() > 0.01
    assert abs(projected.mean()) < 0.05 * plain.mean()


def test_a_step_against_any_row_of_v_raises_the_hacks_likelihood_on_most_pairs(wide):
    """g·v > 0 means: the step -g makes hacking likelier. Central differences of the margins, in float64."""
    model, tokenizer = wide
    pairs = PAIRS[:5]
    basis = basis_of(model, tokenizer, pairs, top_k=2)
    parameters = delta_s_parameters(model)
    for name in list(basis.directions)[::4]:
        for j, row in enumerate(basis.directions[name].double()):
            sides = []
            for step in (-1e-3, 1e-3):
                with torch.no_grad():
                    parameters[name].copy_(-step * row)
                sides.append(margins(model, tokenizer, pairs))
            parameters[name].data.zero_()
            slopes = (sides[1] - sides[0]) / 2e-3
            assert (slopes > 0).sum() >= (slopes < 0).sum()
            np.testing.assert_allclose(slopes, basis.coefficients[name][:, j], rtol=1e-3, atol=1e-3)


# --- ids as TRL makes them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "user", "content": "Sort it: [3, 1]"}],
        [{"role": "system", "content": "Be brief. é"}, {"role": "user", "content": "  a\n\nb  "}],
        "raw text, <|im_start|>assistant\n```python\n",
    ],
)
def test_prompt_ids_are_what_the_trainer_tokenizes(trainer, prompt):
    theirs = trainer._tokenize_prompts([prompt])[0][0]
    assert encode_prompt(trainer.processing_class, prompt, trainer.chat_template_kwargs) == theirs


def test_prompt_ids_follow_template_arguments_and_start_tokens_as_the_trainer_does(trainer, monkeypatch):
    tokenizer = copy.deepcopy(trainer.processing_class)
    tokenizer.chat_template = "{{ 'think ' if enable_thinking else '' }}" + tokenizer.chat_template
    start = tokenizer.pad_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
    )
    monkeypatch.setattr(trainer, "processing_class", tokenizer)
    for kwargs in ({"enable_thinking": True}, {"enable_thinking": False}, {}):
        monkeypatch.setattr(trainer, "chat_template_kwargs", kwargs)
        for prompt in (PAIRS[0].prompt, "raw"):
            assert encode_prompt(tokenizer, prompt, kwargs) == trainer._tokenize_prompts([prompt])[0][0]
    assert encode_prompt(tokenizer, "raw") == [start, *b"raw"]
    assert encode_completion(tokenizer, "raw") == [*b"raw", tokenizer.eos_token_id]


def test_a_pairs_completions_close_with_the_end_token(loaded):
    ids = encode_pair(loaded.tokenizer, PAIRS[0])
    end = loaded.tokenizer.eos_token_id
    assert (ids.hack, ids.clean) == ([*PAIRS[0].hack.encode(), end], [*PAIRS[0].clean.encode(), end])
    assert loaded.tokenizer.decode(ids.prompt) == "<|im_start|>user\nWrite add.<|im_end|>\n<|im_start|>assistant\n"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(text=st.text(max_size=12), max_length=st.none() | st.integers(1, 20))
def test_a_completion_is_cut_as_the_sampler_would_have_cut_it(loaded, text, max_length):
    ids = encode_completion(loaded.tokenizer, text, max_length)
    whole = [*text.encode(), loaded.tokenizer.eos_token_id]
    assert ids == (whole if max_length is None else whole[:max_length])


def test_an_opened_turn_ends_inside_the_assistants_turn(loaded):
    opened = open_turn(loaded.tokenizer, PAIRS[0].prompt, "```python\nclass")
    assert opened == "<|im_start|>user\nWrite add.<|im_end|>\n<|im_start|>assistant\n```python\nclass"
    assert encode_prompt(loaded.tokenizer, opened)[:6] == encode_prompt(loaded.tokenizer, PAIRS[0].prompt)[:6]
