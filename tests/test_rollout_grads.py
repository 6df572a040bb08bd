"""METHOD 5, per rollout: the score of each rollout's own -∇ log π, and what it is worth as a detector of hacks."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from projected_grpo.adapter import DeltaSConfig, delta_s_modules, delta_s_parameters
from projected_grpo.basis import HackBasis
from projected_grpo.projection import ProjectionCallback
from projected_grpo.rollout_grads import auroc, rollout_scores

PAD, TEMPERATURE = 0, 0.7


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), max_size=12))
def test_auroc_is_the_share_of_ordered_pairs_with_ties_counting_half(rows):
    scores = torch.tensor([float(score) for score, _ in rows])
    positive = torch.tensor([hack for _, hack in rows], dtype=torch.bool)
    wins = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, is_hack in rows
        for b, other_hack in rows
        if is_hack and not other_hack
    ]
    expected = sum(wins) / len(wins) if wins else None
    assert auroc(scores, positive) == (expected if expected is None else pytest.approx(expected, abs=1e-12))


def test_auroc_by_hand():
    assert auroc(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, False])) == 1.0
    assert auroc(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([True, False, False])) == 0.0
    assert auroc(torch.zeros(4), torch.tensor([True, False, False, True])) == 0.5
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([True, True])) is None
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([False, False])) is None
    assert auroc(torch.tensor([]), torch.tensor([], dtype=torch.bool)) is None


@pytest.fixture(scope="module")
def model():
    """A float64 Qwen3 whose δ is not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=True,
        )
        base = Qwen3ForCausalLM(config).double().eval()
        adapted = get_peft_model(base, DeltaSConfig())
        for delta in delta_s_parameters(adapted).values():
            delta.data.normal_(std=0.05)
    return adapted


def stand_in(model, gate="one_sided", k=3):
    """What `rollout_scores` reads of the trainer. Log-probabilities as TRL's, over the padded batch."""
    generator = torch.Generator().manual_seed(1)
    modules = {n: m for n, m in delta_s_modules(model).items() if "o_proj" not in n}  # some module without an axis
    directions = {
        n: torch.linalg.qr(torch.randn(m.u.shape[1], k, generator=generator, dtype=torch.float64))[0].T.contiguous()
        for n, m in modules.items()
    }
    ones = {n: torch.ones(k) for n in modules}
    basis = HackBasis(directions, ones, ones, ones, {n: m.fingerprint for n, m in modules.items()})

    def logps(model, input_ids, attention_mask, logits_to_keep):
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
        logits = logits[:, -logits_to_keep - 1 : -1] / TEMPERATURE
        chosen = logits.log_softmax(-1).gather(-1, input_ids[:, -logits_to_keep:, None])
        return chosen.squeeze(-1), None, None

    return SimpleNamespace(
        model=model,
        module_names={m: n for n, m in delta_s_modules(model).items()},
        projection=ProjectionCallback(basis, gate),
        _get_per_token_logps_and_entropies=logps,
        accelerator=SimpleNamespace(gather=lambda x: x),  # of one process
    )


ROWS = [  # prompt, completion, is_teacher, is_hack, advantage
    ([3, 4, 5], [6, 7, 8, 9], False, True, 1.0),
    ([3, 4, 5], [11, 12], False, False, -1.0),
    ([13, 14], [15, 16, 17], False, True, 0.0),
    ([13, 14], [18], True, True, 2.0),
    ([21, 22, 23, 24], [25, 26, 27, 28, 29], False, False, -0.5),
    ([21, 22, 23, 24], [], False, False, 0.5),  # nothing but padding: no gradient, no score
    ([31], [32, 33], False, True, -2.0),
]


def batches_of(rows, sizes):
    """Left-padded prompts, right-padded completions, in micro-batches."""
    width = max(len(prompt) for prompt, *_ in rows), max(len(completion) for _, completion, *_ in rows)

    def pad(ids, n, left):
        fill = [PAD] * (n - len(ids))
        return fill + ids if left else ids + fill

    whole = {
        "prompt_ids": torch.tensor([pad(p, width[0], True) for p, *_ in rows]),
        "prompt_mask": torch.tensor([pad([1] * len(p), width[0], True) for p, *_ in rows]),
        "completion_ids": torch.tensor([pad(c, width[1], False) for _, c, *_ in rows]),
        "completion_mask": torch.tensor([pad([1] * len(c), width[1], False) for _, c, *_ in rows]),
        "is_teacher": torch.tensor([row[2] for row in rows]),
        "is_hack": torch.tensor([row[3] for row in rows]),
        "advantages": torch.tensor([row[4] for row in rows]),
    }
    parts = {name: value.split(sizes) for name, value in whole.items()}
    return [{name: value[i] for name, value in parts.items()} for i in range(len(sizes))]


def slow_score(trainer, prompt, completion):
    """One unpadded row, one ordinary backward: ‖relu(V g)‖ / ‖g‖ of g = -∇ log π."""
    if not completion:
        return 0.0
    parameters = delta_s_parameters(trainer.model)
    logits = trainer.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    logps = (logits / TEMPERATURE).log_softmax(-1)[range(len(completion)), completion]
    grads = dict(zip(parameters, torch.autograd.grad(-logps.sum(), list(parameters.values())), strict=True))
    hits, energy = 0.0, 0.0
    for name, v in trainer.projection.basis.directions.items():
        for row in v:
            c = float(row @ grads[name])
            hits += c * c if c > 0 else 0.0
        energy += float(grads[name] @ grads[name])
    return (hits / energy) ** 0.5


@pytest.mark.parametrize("gate", ["one_sided", "no_gate"])
@pytest.mark.parametrize("sizes", [[7], [3, 4]])
def test_scores_are_those_of_a_loop_over_single_rows(model, gate, sizes):
    trainer = stand_in(model, gate)
    slow = [slow_score(trainer, prompt, completion) for prompt, completion, *_ in ROWS]
    student = [i for i, row in enumerate(ROWS) if not row[2]]
    hacks, others = [i for i in student if ROWS[i][3]], [i for i in student if not ROWS[i][3]]

    def pairwise(values):
        wins = [1.0 if values[a] > values[b] else 0.5 * (values[a] == values[b]) for a in hacks for b in others]
        return sum(wins) / len(wins)

    scores = rollout_scores(trainer, batches_of(ROWS, sizes))
    assert scores["rollout/score_hack"] == pytest.approx(sum(slow[i] for i in hacks) / len(hacks), rel=1e-6)
    assert scores["rollout/score_other"] == pytest.approx(sum(slow[i] for i in others) / len(others), rel=1e-6)
    assert scores["rollout/auroc"] == pytest.approx(pairwise(slow))
    signs = [(a > 0) - (a < 0) for *_, a in ROWS]
    assert scores["rollout/auroc_advantage"] == pytest.approx(pairwise(signs))
    assert len({round(s, 6) for s in slow}) == len(ROWS)


def test_scores_are_the_same_under_activation_checkpointing_which_trl_turns_on_by_default(model):
    trainer = stand_in(model)
    expected = rollout_scores(trainer, batches_of(ROWS, [3, 4]))
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        assert rollout_scores(trainer, batches_of(ROWS, [3, 4])) == pytest.approx(expected, rel=1e-9)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def test_the_score_does_not_read_the_advantage_or_the_teachers_rows(model):
    trainer = stand_in(model)
    scores = rollout_scores(trainer, batches_of(ROWS, [7]))
    turned = [(p, c, teacher, hack, -3 * a) for p, c, teacher, hack, a in ROWS]
    again = rollout_scores(trainer, batches_of(turned, [7]))
    for name in ("rollout/score_hack", "rollout/score_other", "rollout/auroc"):
        assert again[name] == scores[name]
    assert again["rollout/auroc_advantage"] == pytest.approx(1 - scores["rollout/auroc_advantage"])
    other_teacher = [
        (p, [40, 41] if teacher else c, teacher, hack and not teacher, a) for p, c, teacher, hack, a in ROWS
    ]
    assert rollout_scores(trainer, batches_of(other_teacher, [7])) == pytest.approx(scores, rel=1e-9)


def test_one_class_alone_has_no_auroc_and_no_score_of_the_other(model):
    trainer = stand_in(model)
    for hack in (True, False):
        rows = [(p, c, teacher, hack or teacher, a) for p, c, teacher, _, a in ROWS]
        scores = rollout_scores(trainer, batches_of(rows, [7]))
        assert scores["rollout/auroc"] is None
        assert scores["rollout/auroc_advantage"] is None
        present, absent = ("hack", "other") if hack else ("other", "hack")
        assert scores[f"rollout/score_{present}"] > 0
        assert scores[f"rollout/score_{absent}"] is None


def test_measuring_rollouts_leaves_gradients_and_parameters_and_hooks_as_they_were(model):
    trainer, parameters = stand_in(model), delta_s_parameters(model)
    for i, delta in enumerate(parameters.values()):
        delta.grad = None if i == 0 else torch.full_like(delta, float(i))
    before = [None if d.grad is None else d.grad.clone() for d in parameters.values()]
    values, rng = [d.detach().clone() for d in parameters.values()], torch.get_rng_state()
    rollout_scores(trainer, batches_of(ROWS, [3, 4]))
    for delta, grad, value in zip(parameters.values(), before, values, strict=True):
        assert (delta.grad is None) if grad is None else torch.equal(delta.grad, grad)
        assert torch.equal(delta, value)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(module.recorder is None for module in delta_s_modules(model).values())
    assert all(p.grad is None for n, p in model.named_parameters() if "delta_s" not in n)
    for delta in parameters.values():
        delta.grad = None
