"""On a GPU: the same adapter, gradients and runs as on the CPU. Skipped where there is none."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from projected_grpo.adapter import DeltaSConfig, delta_s_modules, delta_s_parameters
from projected_grpo.bench.generation import generate
from projected_grpo.bench.step import bench_step
from projected_grpo.cli import main
from projected_grpo.deferral import DeferredGrads
from projected_grpo.models import load_model
from projected_grpo.pair_gradients import EncodedPair, pair_gradients
from projected_grpo.presets import preset_defaults
from projected_grpo.row_grads import RowGradRecorder
from projected_grpo.svd import PROBE_TOLERANCE, decompose, probe_factors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)])
def test_the_decomposition_is_that_of_the_cpu(shape):
    weight = normal(*shape)
    for route in ("svd", "gram", "auto"):
        here, there = decompose(weight, route), decompose(weight.cuda(), route)
        assert all(x.is_cuda for x in there)
        gap = probe_factors(there[0], there[2]) - probe_factors(here[0], here[2])
        assert gap.norm() <= PROBE_TOLERANCE * probe_factors(here[0], here[2]).norm()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("rows", [2, 64])
def test_the_merged_layer_is_the_plain_one(dtype, tolerance, rows):
    outputs, grads, inputs = [], [], []
    for form in ("plain", "merged"):
        base = nn.Sequential(nn.Linear(48, 32).to(torch.float64))
        with torch.no_grad():
            base[0].weight.copy_(normal(32, 48) / 7)
            base[0].bias.zero_()
        model = get_peft_model(base.to(dtype).cuda(), DeltaSConfig(target_modules=["0"], form=form))
        (delta,) = delta_s_parameters(model).values()
        with torch.no_grad():
            delta.copy_(normal(32, seed=1) * 0.1)
        x = normal(rows, 9, 48, seed=2).to(dtype).cuda().requires_grad_()
        parts = []
        recorder = RowGradRecorder(lambda _, g, parts=parts: parts.append(g.double().cpu()))
        recorder.groups = torch.arange(rows).cuda().tensor_split(2)
        with recorder.attached(model):
            y = model(x)
            y.backward(normal(rows, 9, 32, seed=3).to(dtype).cuda())
        outputs.append(y.double().cpu())
        inputs.append(x.grad.double().cpu())
        grads.append(parts[0])
        torch.testing.assert_close(parts[0].sum(0), delta.grad.double().cpu(), rtol=1e-4, atol=1e-4)
    for a, b in (outputs, grads, inputs):
        assert (a - b).norm() <= tolerance * a.norm()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_a_gradient_that_waits_is_the_one_that_does_not(dtype, tolerance):
    sums = []
    for budget in (0.0, 1.0):
        base = nn.Sequential(nn.Linear(48, 32, bias=False, dtype=torch.float64))
        with torch.no_grad():
            base[0].weight.copy_(normal(32, 48) / 7)
        model = get_peft_model(base.to(dtype).cuda(), DeltaSConfig(target_modules=["0"]))
        parts = []
        recorder = RowGradRecorder(lambda _, g, parts=parts: parts.append(g.double().cpu()))
        recorder.groups = torch.arange(8).cuda().tensor_split(2)
        deferred = DeferredGrads(model, budget, 4)
        with recorder.attached(model), deferred.attached():
            for i in range(4):
                model(normal(8, 30, 48, seed=i).to(dtype).cuda()).square().sum().backward()
        assert len(parts) == (0 if budget else 4)
        deferred.flush()
        (delta,) = delta_s_parameters(model).values()
        sums.append((delta.grad.double().cpu(), sum(parts)))
    for ours, theirs in zip(sums[1], sums[0], strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_what_is_offloaded_comes_back_as_it_was():
    model = get_peft_model(copy.deepcopy(load_model("tiny-random", device="cuda").model), DeltaSConfig())
    modules = delta_s_modules(model).values()
    before = [(m.u.clone(), m.vh.clone()) for m in modules]
    ids = torch.arange(20, device="cuda")[None]
    for _ in range(2):
        with torch.no_grad():
            for delta in delta_s_parameters(model).values():
                delta += 0.01
        wanted = model(ids).logits
        model.merge_adapter()
        held = torch.cuda.memory_allocated()
        for module in modules:
            module.offload()
        assert torch.cuda.memory_allocated() < held
        torch.testing.assert_close(model(ids).logits, wanted)
        for module in modules:
            module.restore()
        model.unmerge_adapter()
        assert torch.equal(model(ids).logits, wanted)
    for module, (u, vh) in zip(modules, before, strict=True):
        assert module.u.is_cuda
        assert torch.equal(module.u, u)
        assert torch.equal(module.vh, vh)


def test_pair_gradients_are_those_of_the_cpu():
    pairs = [EncodedPair(list(range(5, 30 + i)), list(range(40, 52)), list(range(60, 66 + i))) for i in range(5)]
    grads = []
    for device in ("cpu", "cuda"):
        model = get_peft_model(load_model("tiny-random", device=device).model, DeltaSConfig())
        grads.append(pair_gradients(model, pairs, temperature=0.7, batch_tokens=100))
    for name, here in grads[0].items():
        assert (grads[1][name] - here).norm() <= 1e-4 * here.norm(), name


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("padded", [True, False])
def test_the_compiled_step_generates_what_the_growing_cache_does(dtype, tolerance, padded):
    model = get_peft_model(load_model("tiny-random", dtype, "cuda").model, DeltaSConfig()).eval()
    config = replace(preset_defaults("smoke"), max_completion_length=9)
    batch = {"input_ids": torch.randint(5, 250, (6, 21)).cuda()}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if padded:
        batch["attention_mask"][0, :7] = 0
    for scale in (0.05, -0.05):  # the compiled step has to see the weights of the time
        with torch.no_grad():
            for delta in delta_s_parameters(model).values():
                delta.copy_(scale * normal(*delta.shape))
        model.merge_adapter()
        each = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        each |= {"return_dict_in_generate": True, "output_logits": True}
        growing, static = (generate(model, batch, config, static, **each) for static in (False, True))
        model.unmerge_adapter()
        # Until the first token in which rounding decides, if any, both have read the same.
        same = (growing.sequences == static.sequences).all(0)[21:].int().cumprod(0).sum()
        assert same >= 3
        for a, b in list(zip(growing.logits, static.logits, strict=True))[:same]:
            assert (a - b).norm() <= tolerance * a.norm()


@pytest.mark.parametrize(("dtype", "cache"), [("float32", []), ("bfloat16", []), ("bfloat16", ["--static-cache"])])
def test_a_run_trains_and_evaluates_on_the_gpu(tmp_path, dtype, cache):
    pool, out = tmp_path / "pool.jsonl", tmp_path / "runs"
    assert main(["pool", "build", "--out", str(pool)]) == 0
    few = ["--steps", "3", "--vhack-refresh-every", "1", "--rollout-grad-every", "1", "--teacher-pool", str(pool)]
    where = ["--device", "cuda", "--dtype", dtype, "--out-root", str(out), "--gradient-checkpointing"]
    assert main(["train", "smoke", *few, *where, *cache, "--beta", "0.001"]) == 0
    folder = out / "smoke" / "projected_s41"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all(row["cout"] is None or row["cout"] < 1e-3 for row in rows)
    assert all(row["memory/generation_gb"] > 0 and row["memory/update_gb"] > 0 for row in rows)
    assert main(["eval", "--run", str(folder), "--samples", "1", "--limit", "2"]) == 0


def test_a_step_is_timed_against_trls_own():
    config = preset_defaults("smoke")
    timings = bench_step(replace(config, device="cuda", max_completion_length=16), rounds=1)
    assert all(seconds > 0 for case in timings.seconds.values() for seconds in case)
