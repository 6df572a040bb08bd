"""The split gradient, the mixed group and the teacher's ratio, on the trainer itself."""

import random
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from projected_grpo.adapter import DeltaSConfig, delta_s_modules, delta_s_parameters
from projected_grpo.basis import HackBasis
from projected_grpo.decoding import GROUPED
from projected_grpo.deferral import DeferredGrads
from projected_grpo.env.grader import Grader
from projected_grpo.env.problems import load_problems
from projected_grpo.env.rewards import CodeReward
from projected_grpo.models import load_model
from projected_grpo.pairs import load_pairs
from projected_grpo.pool import load_pool
from projected_grpo.projection import ProjectionCallback
from projected_grpo.projector import joint_norm
from projected_grpo.prompting import Prompter, prompt_rows
from projected_grpo.run import grpo_config
from projected_grpo.step_columns import SOURCES
from projected_grpo.trainer import ProjectedGRPOTrainer


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1) as grader:
        yield grader


def make_trainer(config, material, grader, double=False, **settings):
    problems = load_problems(material / "problems.toml")
    loaded = load_model("tiny-random", device="cpu")
    if double:
        loaded.model.double()
    prompter = Prompter(loaded)
    model = get_peft_model(loaded.model, DeltaSConfig())
    torch.manual_seed(3)
    for parameter in delta_s_parameters(model).values():
        parameter.data.normal_(0, 0.05)
    basis = HackBasis.extract_from_model(
        model, loaded.tokenizer, load_pairs(material / "pairs.jsonl"), temperature=config.temperature, top_k=2
    )
    config.run_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    trainer = ProjectedGRPOTrainer(
        model=model,
        args=grpo_config(config, prompter),
        train_dataset=Dataset.from_list(prompt_rows(prompter, problems, ["run_tests"] * len(problems))),
        processing_class=loaded.tokenizer,
        projection=ProjectionCallback(basis, measure_only=True),
        reward=CodeReward(grader, problems),
        pool=load_pool(material / "pool.jsonl"),
        num_teacher=config.num_teacher,
        on_row=rows.append,
        **settings,
    )
    return trainer, rows


class SpyOnGradients(ProjectionCallback):
    """Keeps the whole clipped gradient and the two sources' sums as the optimiser step sees them."""

    def __init__(self, inner, trainer):
        super().__init__(inner.basis, measure_only=True)
        self.trainer, self.seen, self.students_alone = trainer, [], inner.student_grads

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        whole = {name: p.grad.clone() for name, p in delta_s_parameters(model).items()}
        sums = self.trainer._source_grads
        parts = {source: {name: rows[i] for name, rows in sums.items()} for i, source in enumerate(SOURCES)}
        parts["student, clipped"] = self.students_alone()
        self.seen.append((whole, parts, self.trainer._grad_norm))
        super().on_pre_optimizer_step(args, state, control, model=model, **kwargs)


@pytest.mark.parametrize(
    ("beta", "double", "tolerance", "budget"),
    [
        (0.0, True, 1e-10, 1.0),
        pytest.param(0.05, True, 1e-10, 0.0, marks=pytest.mark.slow),
        pytest.param(0.05, False, 1e-5, 1.0, marks=pytest.mark.slow),
    ],
)
def test_the_sources_gradients_sum_to_the_whole_unclipped_gradient(
    small_config, material, grader, monkeypatch, beta, double, tolerance, budget
):
    """The whole is the plain forward's, whose sum over rows is autograd's own and knows of no sources."""
    config = replace(small_config, steps=1, micro_batch=2, max_grad_norm=1e-2, beta=beta)
    seen, flushed = {}, []
    flush = DeferredGrads.flush
    monkeypatch.setattr(DeferredGrads, "flush", lambda *args: flushed.append(len(args[0]._held)) or flush(*args))
    for form in ("plain", "merged"):
        trainer, rows = make_trainer(config, material, grader, double, defer_budget_gb=budget)
        for module in delta_s_modules(trainer.model).values():
            module.form = form
        spy = SpyOnGradients(trainer.projection, trainer)
        trainer.remove_callback(trainer.projection)
        trainer.projection = spy
        trainer.add_callback(spy)
        trainer.train()
        (seen[form],) = spy.seen
    assert flushed[0] == 0  # the plain forward defers nothing, and the merged one does once a step
    assert len(flushed) == 2
    assert (flushed[1] > 0) == (budget > 0)
    whole = seen["plain"][0]
    for (_, parts, norm), row in zip([seen["merged"]], rows, strict=True):
        clip = min(1.0, config.max_grad_norm / (norm + 1e-6))
        assert clip < 1  # clipping is at work, or the factor would go untested
        scale = joint_norm(parts["student"]) + joint_norm(parts["teacher"])
        for name, grad in whole.items():
            total = parts["student"][name] + parts["teacher"][name]
            assert (total * clip - grad).norm() <= tolerance * scale * clip + (0 if double else 1e-12)
            assert torch.equal(parts["student, clipped"][name], parts["student"][name] * clip)
        assert row["grad_norm_s"] == pytest.approx(joint_norm(parts["student"]) * clip, rel=1e-5)
        assert row["grad_norm_t"] == pytest.approx(joint_norm(parts["teacher"]) * clip, rel=1e-5)
        assert row["cin_t"] == pytest.approx(spy.projector.hack_share(parts["teacher"]), rel=1e-5)


def test_a_step_that_did_not_end_leaves_nothing_to_the_next(small_config, material, grader):
    """Whoever catches what stopped a run may train on with the same trainer."""
    trainer, rows = make_trainer(replace(small_config, steps=1, micro_batch=2), material, grader, defer_budget_gb=1.0)
    compute, calls, seen = trainer._compute_loss, [], []

    def fail(model, inputs):
        calls.append(compute(model, inputs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return calls[-1]

    trainer._compute_loss = fail
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer._deferred._held
    assert trainer._step_rows
    assert trainer._loss_sum != 0

    def watch(model, inputs):
        seen.append((len(trainer._deferred._held), len(trainer._step_rows), trainer._loss_sum))
        return compute(model, inputs)

    trainer._compute_loss = watch
    trainer.train()
    assert seen[0] == (0, 0, 0.0)
    assert len(rows) == 1
    assert trainer._deferred._room == trainer._deferred._budget


def test_teacher_rows_are_the_pools_text_with_the_end_token_and_are_never_generated(small_config, material, grader):
    trainer, _ = make_trainer(replace(small_config, steps=1), material, grader)
    sizes, kept = [], {}
    base_generate = trainer.model.generate
    trainer.model.generate = lambda *args, **kwargs: (
        sizes.append(len(kwargs["input_ids"])) or base_generate(*args, **kwargs)
    )
    compute = trainer._compute_loss

    def keep(model, inputs):
        for ids, mask, teacher in zip(
            inputs["completion_ids"], inputs["completion_mask"], inputs["is_teacher"], strict=True
        ):
            kept.setdefault(bool(teacher), []).append(ids[mask.bool()].tolist())
        return compute(model, inputs)

    trainer._compute_loss = keep
    trainer.train()
    assert sizes == [4]  # 2 problems x 2 student slots
    tokenizer = trainer.processing_class
    texts = {row.completion for row in trainer.pool.rows}
    assert len(kept[True]) == len(kept[False]) == 4
    for ids in kept[True]:
        whole = ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text in texts if whole else any(t.startswith(text) for t in texts)
        assert whole or len(ids) == small_config.max_completion_length


def test_the_teachers_ratio_is_one_on_every_reuse_and_the_students_is_not(small_config, material, grader):
    config = replace(small_config, steps=4, steps_per_generation=1, num_iterations=2, learning_rate=0.05)
    trainer, _ = make_trainer(config, material, grader)
    ratios = []
    whole = ProjectedGRPOTrainer._get_per_token_logps_and_entropies

    def watch(*args, **kwargs):
        out = whole(trainer, *args, **kwargs)
        inputs = trainer._loss_inputs
        if inputs is not None:
            gap = (out[0].detach() - inputs["old_per_token_logps"]) * inputs["completion_mask"]
            ratios.append((gap[inputs["is_teacher"]].abs().max().item(), gap[~inputs["is_teacher"]].abs().max().item()))
        return out

    trainer._get_per_token_logps_and_entropies = watch
    trainer.train()
    assert all(teacher == 0.0 for teacher, _ in ratios)
    assert max(student for _, student in ratios) > 1e-3


@pytest.mark.parametrize("static", [False, True])
def test_generation_runs_on_merged_weights_that_are_put_back_exactly(small_config, material, grader, static):
    trainer, _ = make_trainer(replace(small_config, steps=1), material, grader, static_cache=static)
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if "base_layer" in name}
    merged = []
    base_generate = trainer.model.generate

    def generate(*args, **kwargs):
        name, weight = next(iter(before.items()))
        merged.append(not torch.equal(dict(trainer.model.named_parameters())[name], weight))
        assert (trainer.model.config._attn_implementation == GROUPED) == static
        config = kwargs["generation_config"]
        assert (config.cache_implementation == "static") == (not config.disable_compile) == static
        return base_generate(*args, **kwargs)

    trainer.model.generate = generate
    trainer.train()
    assert merged == [True]
    assert trainer.model.config._attn_implementation == "sdpa"
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_the_pools_order_is_a_function_of_the_seed(material):
    pool, again = load_pool(material / "pool.jsonl"), load_pool(material / "pool.jsonl")
    first = [row.completion for row in pool.draw("double", 9, random.Random("41/0"))]
    assert first == [row.completion for row in again.draw("double", 9, random.Random("41/0"))]
    assert sorted(first[:4]) == sorted(first[4:8])
