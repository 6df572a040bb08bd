"""A step's generation with a growing cache and with a static one, whose step is compiled on a GPU (`decoding`)."""

from contextlib import nullcontext
from functools import partial
from statistics import median

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import GenerationConfig

from projected_grpo.adapter import DeltaSConfig
from projected_grpo.bench.timing import Timings, in_turn, machine
from projected_grpo.config import TrainConfig
from projected_grpo.decoding import grouped_attention_in, merged, use_static_cache
from projected_grpo.encoding import encode_prompt
from projected_grpo.models import load_model
from projected_grpo.prompting import Prompter
from projected_grpo.run import check_enough
from projected_grpo.sources import assign_modes, problems_of

GROWING, STATIC = "growing cache", "static cache"


def bench_generation(config: TrainConfig, rounds: int) -> Timings:
    """Seconds in which the students' rows of one step are sampled, to the full length, `rounds` times after one of each
    that is not counted; before them the static cache's first, which is told of: on a GPU it compiles."""
    prompter = Prompter(load_model(config.model, config.dtype, config.device), config.max_prompt_length, config.wording)
    batch = _first_batch(config, prompter)
    model = get_peft_model(prompter.loaded.model, DeltaSConfig()).eval()
    shape = {"rows": len(batch["input_ids"]), "tokens": config.max_completion_length}

    cases = {
        case: partial(generate, model, batch, config, static) for case, static in ((GROWING, False), (STATIC, True))
    }
    with merged(model, unless=False, offload=config.offload):
        (first,) = in_turn({STATIC: cases[STATIC]}, 1, model.device, warm_up=0)[STATIC]
        seconds = in_turn(cases, rounds, model.device)
    each = {case: f"{1e3 * median(times) / shape['tokens']:.1f}" for case, times in seconds.items()}
    notes = (
        f"milliseconds a token of all rows, prompts included: {GROWING} {each[GROWING]}, {STATIC} {each[STATIC]}",
        f"the static cache's first generation{_compiles(model)}: {first:.1f} s",
    )
    about = {"model": config.model, "dtype": config.dtype, **shape, "prompt": batch["input_ids"].shape[1]}
    return Timings("generation of one step", seconds, about | machine(model.device), notes=notes)


def _compiles(model: PeftModel) -> str:
    return ", which compiles" if model.device.type == "cuda" else ", which compiles nothing on this device"


def _first_batch(config: TrainConfig, prompter: Prompter) -> dict[str, Tensor]:
    problems, tokenizer = problems_of(config.problems), prompter.loaded.tokenizer
    check_enough(config, problems)
    modes = assign_modes(problems, config.modes)
    asked = list(zip(problems, modes, strict=True))[: config.prompts_per_step * config.steps_per_generation]
    prompts = [prompter.row(*one)["prompt"] for one in asked for _ in range(config.group_size - config.num_teacher)]
    encoded = [encode_prompt(tokenizer, prompt, prompter.template_kwargs) for prompt in prompts]
    padded = tokenizer.pad({"input_ids": encoded}, padding_side="left", return_tensors="pt")
    return dict(padded.to(prompter.loaded.model.device))


def generate(model: PeftModel, batch: dict[str, Tensor], config: TrainConfig, static: bool, **more: object):
    """All of `batch` to the full length, as the trainer samples it; `more` goes to the GenerationConfig."""
    length = config.max_completion_length
    sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    generation = GenerationConfig(
        **sampling | more, max_new_tokens=length, min_new_tokens=length, pad_token_id=0, disable_compile=True
    )
    if static:
        use_static_cache(generation, batch["input_ids"].shape[1] + length)
    with torch.no_grad(), grouped_attention_in(model) if static else nullcontext():
        return model.generate(**batch, generation_config=generation)
