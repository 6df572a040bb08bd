"""Generation by vLLM, over stand-ins: what the server is sent, and what a run makes of what it gets back.

vLLM itself runs on a GPU only; docs/performance.md says whether it has been tried.
"""

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from peft import get_peft_model
from trl.generation.vllm_generation import VLLMGeneration

from projected_grpo.adapter import DeltaSConfig, delta_s_parameters
from projected_grpo.errors import InputError
from projected_grpo.models import load_model
from projected_grpo.run import grpo_config, train
from projected_grpo.steplog import read_metrics
from projected_grpo.trainer import ProjectedGRPOTrainer


class Client:
    """Records what TRL pushes to the server."""

    def __init__(self):
        self.metadata, self.sent, self.resets = [], {}, 0

    def update_named_params(self, metadata, named_params):
        self.metadata = metadata
        self.sent = {name: value.detach().clone() for name, value in named_params}

    def reset_prefix_cache(self):
        self.resets += 1

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}


def test_the_server_gets_the_merged_dense_weights_and_delta_is_as_it_was():
    base = load_model("tiny-random", "float32", "cpu").model
    plain = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, DeltaSConfig())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for delta in delta_s_parameters(model).values():
            delta += 0.1 * torch.randn(delta.shape, generator=generator)
    deltas = {name: delta.detach().clone() for name, delta in delta_s_parameters(model).items()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    client = Client()
    sync = object.__new__(VLLMGeneration)  # its constructor looks for a server
    sync.__dict__ |= {
        "model": model,
        "mode": "server",
        "vllm_client": client,
        "accelerator": SimpleNamespace(is_main_process=True),
        "_weight_metadata": None,
        "_dist": SimpleNamespace(is_fsdp=False, gather_params=lambda params: torch.no_grad()),
        "enable_sleep_mode": False,
    }
    for _ in range(2):  # the second time the names are known already
        client.sent = {}
        sync.sync_weights()
        assert client.sent.keys() == plain.keys()
        assert [(name, tuple(shape)) for name, _, shape in client.metadata] == [
            (name, tuple(value.shape)) for name, value in client.sent.items()
        ]
        for name, value in client.sent.items():
            module = name.removesuffix(".weight")
            if module not in deltas:
                assert torch.equal(value, plain[name]), name
                continue
            u, _, vh = torch.linalg.svd(plain[name].double(), full_matrices=False)
            # Signs of singular vectors cancel in u diag(δ) vh, their order does not: S is descending in both.
            expected = plain[name].double() + (u * deltas[module].double()) @ vh
            assert torch.allclose(value.double(), expected, rtol=0, atol=1e-4), name
            assert not torch.allclose(value, plain[name], rtol=0, atol=1e-4), name
    assert client.resets == 2
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


class Generation:
    """In VLLMGeneration's place: knows how it was set up, and answers with tokens and their log-probabilities."""

    made: ClassVar["list[Generation]"] = []

    def __init__(self, **settings):
        self.settings, self.synced, self.asked, self.vllm_client = settings, 0, [], Client()
        Generation.made.append(self)

    def sync_weights(self):
        self.synced += 1

    def generate(self, prompts, images, num_generations, profiler=None):
        self.asked.append((len(prompts), num_generations))
        assert len(prompts) % num_generations == 0
        for start in range(0, len(prompts), num_generations):  # whole groups of one prompt, as the server takes them
            assert len({tuple(ids) for ids in prompts[start : start + num_generations]}) == 1
        draw = random.Random(len(self.asked))
        completions = [[draw.randrange(5, 200) for _ in range(draw.randint(3, 9))] for _ in prompts]
        logprobs = [[[-5.0] for _ in ids] for ids in completions]
        return prompts, completions, logprobs, None


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_a_run_over_vllm_asks_for_the_students_alone_and_syncs_each_step(small_config, monkeypatch, mode):
    monkeypatch.setattr("projected_grpo.run.is_vllm_available", lambda: True)
    monkeypatch.setattr("trl.trainer.grpo_trainer.is_vllm_available", lambda: True, raising=False)
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Generation)
    Generation.made.clear()
    config = replace(
        small_config, steps=2, vllm=mode, vllm_gpu_memory=0.4, vllm_server="http://gpu:9000", static_cache=True
    )
    ratios = {True: [], False: []}
    compute = ProjectedGRPOTrainer._compute_loss

    def watched(self, model, inputs):
        ratio = inputs["importance_sampling_ratio"].expand(inputs["completion_mask"].shape)
        for row, mask, teacher in zip(ratio, inputs["completion_mask"].bool(), inputs["is_teacher"], strict=True):
            ratios[bool(teacher)] += row[mask].tolist()
        return compute(self, model, inputs)

    monkeypatch.setattr(ProjectedGRPOTrainer, "_compute_loss", watched)
    train(config)
    assert set(ratios[True]) == {1.0}  # TRL's correction for another engine's sampling is none of the teacher's
    assert all(0 < ratio != 1 for ratio in ratios[False])
    assert len(ratios[False]) > 8
    (generation,) = Generation.made
    assert generation.settings["mode"] == mode
    assert generation.settings["server_base_url"] == "http://gpu:9000"
    assert generation.settings["gpu_memory_utilization"] == 0.4
    assert (generation.settings["temperature"], generation.settings["top_p"]) == (config.temperature, config.top_p)
    assert generation.settings["max_completion_length"] == config.max_completion_length
    assert generation.asked == [(4, 2)] * 2  # two prompts with two students each; the teachers' slots are not asked for
    assert generation.synced == 2
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["cin_t"] is not None and row["hack_teacher"] + row["pass_teacher"] == 1 for row in rows)


def test_what_vllm_needs_is_asked_for_before_anything_is_loaded(small_config, monkeypatch):
    monkeypatch.setattr("projected_grpo.run.is_vllm_available", lambda: False)
    with pytest.raises(InputError, match=r"--vllm server: vLLM is not installed; install projected-grpo\[vllm\]"):
        train(replace(small_config, vllm="server"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"each of 2 processes has 2 rows of a generation, no whole groups of 4"):
        grpo_config(replace(small_config, vllm="server", prompts_per_step=1, micro_batch=2), None)
