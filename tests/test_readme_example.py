"""The README's three lines inside a stock TRL trainer: nothing of ours but the adapter's config and the callback."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from projected_grpo import DeltaSConfig, HackBasis, ProjectionCallback, load_pairs
from projected_grpo.adapter import delta_s_modules, delta_s_parameters
from projected_grpo.errors import InputError
from projected_grpo.models import load_model
from projected_grpo.projector import joint_norm

N_STEPS = 2


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """Four short pairs, each with a prompt of its own."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {
            "id": f"pair-{i}",
            "axis": "run_tests",
            "prompt": [{"role": "user", "content": f"Write f{i} and its test."}],
            "hack": f"def run_tests():\n    print({i})",
            "clean": f"def f{i}(x):\n    return x + {i}",
        }
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def distinct_bytes(completions, **_):
    """A reward on which the rollouts of a group hardly ever agree."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(len(set(text))) + 0.1 * sum(map(ord, text)) % 7 for text in texts]


class Spy(TrainerCallback):
    """Comes after the projection: what the optimiser gets, and what later callbacks are told."""

    def __init__(self):
        self.norms, self.logs, self.overlaps = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.norms.append(joint_norm({n: d.grad for n, d in delta_s_parameters(model).items()}))

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.logs.append(dict(logs))


def trainer_of(folder, seed=0, callbacks=None, **options):
    loaded = load_model("tiny-random", device="cpu", seed=seed)
    args = GRPOConfig(
        output_dir=str(folder),
        loss_type="dr_grpo",
        scale_rewards="none",
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        num_generations=4,
        gradient_accumulation_steps=2,
        max_completion_length=12,
        max_steps=N_STEPS,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=1,
        **options,
    )
    return GRPOTrainer(
        model=loaded.model,
        processing_class=loaded.tokenizer,
        reward_funcs=distinct_bytes,
        peft_config=DeltaSConfig(),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": f"Say {i}."}]} for i in range(8)]),
        callbacks=callbacks,
    )


@pytest.fixture(scope="module")
def run(pairs_file, tmp_path_factory):
    """The three lines, and what came of them."""
    trainer = trainer_of(tmp_path_factory.mktemp("run"))
    basis = HackBasis.extract(trainer, load_pairs(pairs_file), top_k=2)
    callback = ProjectionCallback(basis, gate="one_sided")
    trainer.add_callback(callback)
    spy = Spy()
    trainer.add_callback(spy)
    assert all(delta.grad is None for delta in delta_s_parameters(trainer.model).values())
    trainer.train()
    return trainer, callback, spy


def test_the_three_lines_project_every_optimiser_step(run):
    trainer, callback, spy = run
    assert trainer.state.global_step == N_STEPS
    assert len(spy.logs) == N_STEPS  # once a step, not once a micro-batch
    for logs in spy.logs:
        assert logs["projection/cout"] < 1e-6 <= logs["projection/cin"]
        assert 0 < logs["projection/cin_null"] < 1
        assert 0 < logs["projection/fired"] <= 1
    assert callback.metrics["v_delta"] != 0
    assert all(delta.any() for delta in delta_s_parameters(trainer.model).values())
    assert type(trainer) is GRPOTrainer


def test_the_basis_reads_its_settings_from_the_trainer_and_leaves_the_head_out(run):
    trainer, callback, _ = run
    assert callback.basis.info.temperature == trainer.temperature
    assert callback.basis.info.n_pairs == 4
    assert callback.basis.directions.keys() <= delta_s_modules(trainer.model).keys()
    assert all(v.shape[0] <= 2 for v in callback.basis.directions.values())
    assert not any("lm_head" in name for name in delta_s_modules(trainer.model))


def test_the_trainers_own_history_keeps_the_projection_metrics(run):
    """Trainer.log files a copy of the logs away before any callback sees them; what is only added to `logs` is lost."""
    trainer, _, spy = run
    steps = [row for row in trainer.state.log_history if "loss" in row]
    assert len(steps) == N_STEPS
    for row, logs in zip(steps, spy.logs, strict=True):
        assert row["projection/cin"] == logs["projection/cin"]
        assert row["projection/cout"] == logs["projection/cout"]


def test_projection_comes_after_accumulation_and_clipping_and_refresh_extracts_on_the_current_policy(
    pairs_file, tmp_path
):
    """With a KL term, whose reference policy is the model without its adapter, and a basis extracted anew."""
    trainer = trainer_of(tmp_path, beta=0.05, max_grad_norm=1e-4)
    pairs = load_pairs(pairs_file)
    first = HackBasis.extract(trainer, pairs, top_k=2)
    made = []

    def refresh():
        assert all(delta.grad is None or not delta.grad.any() for delta in delta_s_parameters(trainer.model).values())
        made.append(HackBasis.extract(trainer, pairs, top_k=2))
        return made[-1]

    callback = ProjectionCallback(first, gate="one_sided", refresh_every=1, refresh=refresh)
    before, after = Spy(), Spy()
    for each in (before, callback, after):
        trainer.add_callback(each)
    trainer.train()
    assert trainer.model.peft_config.keys() == {"default"}
    for logs in after.logs:
        assert logs["projection/cout"] < 1e-6 <= logs["projection/cin"]
    # The gradient arrives clipped and leaves projected: shorter than the limit, and nobody has clipped it since.
    assert before.norms == pytest.approx([1e-4] * N_STEPS, rel=1e-2)
    assert all(0 < norm < 1e-4 for norm in after.norms)
    assert [logs["projection/grad_norm_projected"] for logs in after.logs] == pytest.approx(after.norms)
    assert after.logs[0]["grad_norm"] > after.norms[0]  # TRL's own is that before the projection
    assert after.logs[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert after.logs[1]["kl"] > 0
    assert len(made) == N_STEPS - 1
    assert callback.basis is made[0]
    assert "projection/refresh/overlap" not in after.logs[0]
    assert after.logs[1]["projection/refresh/overlap"] == pytest.approx(made[0].overlap(first).mean)
    assert 0.5 < after.logs[1]["projection/refresh/overlap"] < 1  # one step moves δ a little and the basis with it
    name = next(iter(first.directions))
    assert not torch.equal(made[0].directions[name], first.directions[name])


def test_a_basis_of_another_model_is_refused_before_training(run, tmp_path):
    _, callback, _ = run
    other = trainer_of(tmp_path, seed=5)
    other.add_callback(ProjectionCallback(callback.basis))
    with pytest.raises(InputError, match="does not fit this model"):
        other.train()
    assert other.state.global_step == 0
    assert not any(delta.any() for delta in delta_s_parameters(other.model).values())
