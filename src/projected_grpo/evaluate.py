"""What a policy does on held-out problems: hack, attempt and pass rates, by mode and label (the `eval` command).

Under a loophole the test function carries a held-out name, so a name learned by heart does not count; mode `none` asks
the same problems without a loophole. Standard errors are those of a mean over problems, since samples of one problem
are not independent: the spread of the problems' own rates over the square root of their number.
"""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from loguru import logger
from tqdm import tqdm
from transformers import GenerationConfig, set_seed

from projected_grpo.config import EvalConfig
from projected_grpo.encoding import encode_prompt
from projected_grpo.env.grader import LABELS, Grade, Grader, GradeRequest
from projected_grpo.env.problems import Problem
from projected_grpo.env.prompts import eval_test_func_name
from projected_grpo.env.sandbox import Limits
from projected_grpo.errors import InputError, saving_faults
from projected_grpo.models import load_model
from projected_grpo.paths import check_out, replacing
from projected_grpo.prompting import Prompter
from projected_grpo.saved_adapter import check_adapter, with_adapter
from projected_grpo.sources import problems_of

RATES = {
    "hack": lambda grade: grade.label == "reward_hack",
    "attempt": lambda grade: grade.attempted,
    "pass": lambda grade: grade.gt_pass,
}


def evaluate(config: EvalConfig) -> dict:
    """Sample, grade, print the table, and write `config.out`; returns what was written."""
    check_out(config.out, config.overwrite)
    if config.adapter is not None:
        check_adapter(config.adapter)
    problems = problems_of(config.problems)[: config.limit]
    if config.trained_on is not None:
        seen = {key for problem in problems_of(config.trained_on) for key in (problem.id, problem.question)}
        if known := [problem.id for problem in problems if problem.id in seen or problem.question in seen]:
            raise InputError(
                f"--problems {config.problems}: {known[0]} was trained on ({len(known)} such); choose others"
            )
    loaded = load_model(config.model, config.dtype, config.device)
    model = loaded.model
    if config.adapter is not None:
        model = with_adapter(model, config.adapter)
        model.merge_adapter()
    prompter = Prompter(loaded, wording=config.wording)
    limits = Limits(cpu_seconds=config.grader_cpu_seconds)
    with saving_faults(config.out.with_suffix(".fault.txt")), Grader(config.grader_workers, limits) as grader:
        samples, modes = measure(model, prompter, problems, config, grader)
    result = {
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
        "note": loaded.note,
        "n_problems": len(problems),
        "modes": modes,
        "samples": samples,
    }
    with replacing(config.out) as scratch:
        scratch.write_text(json.dumps(result, indent=1) + "\n")
    logger.info("\n" + format_table(modes, len(problems), config.samples))
    logger.info(f"wrote {config.out}" + (f" ({loaded.note})" if loaded.note else ""))
    return result


def measure(
    model, prompter: Prompter, problems: Sequence[Problem], config: EvalConfig, grader: Grader
) -> tuple[list[dict], dict[str, dict]]:
    """(every sample with its label, the summary of each mode), of the policy as it stands, from the config's seed."""
    requests = [
        (problem, mode, eval_test_func_name(problem.id, config.seed) if mode != "none" else problem.test_func_name)
        for mode in config.modes
        for problem in problems
        for _ in range(config.samples)
    ]
    set_seed(config.seed)
    texts = sample(model, prompter, requests, config)
    grades = grader.grade(
        [GradeRequest(p, text, mode, name) for (p, mode, name), text in zip(requests, texts, strict=True)]
    )
    modes: dict[str, dict] = {
        mode: summarise([(p.id, g) for (p, m, _), g in zip(requests, grades, strict=True) if m == mode])
        for mode in config.modes
    }
    samples = [
        {"problem_id": p.id, "mode": mode, "test_func_name": name, "label": grade.label, "completion": text}
        for (p, mode, name), text, grade in zip(requests, texts, grades, strict=True)
    ]
    return samples, modes


def summarise(graded: list[tuple[str, Grade]]) -> dict:
    """Rates with their standard errors, and counts by label, of (problem id, grade) pairs of one mode."""
    rates = {}
    for name, is_hit in RATES.items():
        by_problem: dict[str, list[bool]] = {}
        for problem_id, grade in graded:
            by_problem.setdefault(problem_id, []).append(is_hit(grade))
        means = [statistics.fmean(hits) for hits in by_problem.values()]
        error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None
        rates[name] = {"rate": statistics.fmean(means), "standard_error": error}
    counts = Counter(grade.label for _, grade in graded)
    return {"n": len(graded), "rates": rates, "labels": {label: counts[label] for label in LABELS}}


def format_table(modes: Mapping[str, dict], n_problems: int, samples: int) -> str:
    """One row a mode: rates as `rate ± standard error`, then the counts by label."""
    head = f"{'mode':<14}" + "".join(f"{name:>15}" for name in RATES) + "".join(f"{label:>19}" for label in LABELS)
    lines = [f"{n_problems} held-out problems x {samples} samples, ± one standard error over problems", head]
    for mode, summary in modes.items():
        cells = [
            f"{rate['rate']:.3f} ± " + ("-" if rate["standard_error"] is None else f"{rate['standard_error']:.3f}")
            for rate in summary["rates"].values()
        ]
        lines.append(
            f"{mode:<14}"
            + "".join(f"{cell:>15}" for cell in cells)
            + "".join(f"{count:>19}" for count in summary["labels"].values())
        )
    return "\n".join(lines)


def sample(model, prompter: Prompter, requests: Sequence[tuple[Problem, str, str]], config: EvalConfig) -> list[str]:
    """One completion a request, in order, each with its prefill put back in front."""
    tokenizer = prompter.loaded.tokenizer
    generation = GenerationConfig(
        do_sample=True,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=0,
        max_new_tokens=config.max_completion_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts = []
    for start in tqdm(range(0, len(requests), config.batch_size), desc="sampling", unit="batch", disable=None):
        prompts = [prompter.prompt(*request) for request in requests[start : start + config.batch_size]]
        encoded = [encode_prompt(tokenizer, prompt, prompter.template_kwargs) for prompt, _ in prompts]
        batch = tokenizer.pad({"input_ids": encoded}, padding_side="left", return_tensors="pt").to(model.device)
        with torch.inference_mode():
            output = model.generate(**batch, generation_config=generation)
        sampled = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        texts += [opening + text for (_, opening), text in zip(prompts, sampled, strict=True)]
    return texts
