"""A finished run for others to use: its adapter, or its model with δ merged in, with a card; the `export` command.

The card says what the run was and what came of it, its hack rate above all: a policy that was trained where its grader
can be fooled should not be met without that number. `--push-to-hub` hands the folder to the hub as it lies there.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from loguru import logger

from projected_grpo.arms import ARMS
from projected_grpo.basis import BasisInfo, HackBasis
from projected_grpo.config import TrainConfig
from projected_grpo.errors import InputError, RunFault
from projected_grpo.models import load_model
from projected_grpo.run_state import LAST_FILE, is_trained, read_starts
from projected_grpo.saved_adapter import check_adapter, with_adapter


@dataclass(frozen=True)
class Facts:
    """What a card says of a run."""

    config: TrainConfig
    basis: BasisInfo
    code: Sequence[str]
    note: str
    evaluation: dict[str, Any] | None


def export(run: Path, out: Path, merged: bool, overwrite: bool, push_to_hub: str | None, public: bool = False) -> Path:
    """Write `out` whole or not at all, then push it where that is asked for; returns `out`.

    Raises:
        InputError: no finished run, an `out` that is there, or a run whose model is not the one at hand.
        RunFault: the hub did not take it; the folder is written.
    """
    if not (run / "config.json").is_file() or not is_trained(run):
        raise InputError(f"RUN {run} is no finished run; give a folder that `projected-grpo train` has filled")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a folder")
    if run.resolve().is_relative_to(out.resolve()):
        raise InputError(f"--out {out} holds the run itself; choose another folder")
    if out.exists() and not overwrite:
        raise InputError(f"--out {out} exists; choose another folder or add --overwrite")
    config = TrainConfig.from_file(run / "config.json")
    check_adapter(run / "adapter")
    evaluation = run / "eval.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch, out.name)
        if merged:
            note = _write_merged(config, run / "adapter", folder)
        else:
            # The trainer's own arguments are a pickle, full of this machine's paths.
            shutil.copytree(run / "adapter", folder, ignore=shutil.ignore_patterns("training_args.bin"))
            shutil.copy(run / LAST_FILE, folder)
            note = ""
        facts = Facts(
            config,
            HackBasis.load(run / LAST_FILE).info,
            list(dict.fromkeys(start["code"] for start in read_starts(run))),
            note,
            json.loads(evaluation.read_text()) if evaluation.is_file() else None,
        )
        (folder / "README.md").write_text(card(facts, merged, push_to_hub or str(out)))
        if out.exists():
            out.rename(Path(scratch, "before"))
        folder.rename(out)
    logger.info(f"wrote {out}")
    if push_to_hub is not None:
        _push(out, push_to_hub, public)
    return out


def _write_merged(config: TrainConfig, adapter: Path, folder: Path) -> str:
    """The model as plain transformers loads it; what has to be said of the base model's numbers."""
    loaded = load_model(config.model, config.dtype, "cpu")
    model = with_adapter(loaded.model, adapter).merge_and_unload()
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return loaded.note


def _push(folder: Path, name: str, public: bool) -> None:
    hub = HfApi()
    try:
        hub.create_repo(name, exist_ok=True, private=not public)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="projected-grpo export")
    except Exception as error:  # its client's, its HTTP library's, the system's: all of them end here
        first = str(error).strip().partition("\n")[0]
        raise RunFault(f"{folder} is written, but the hub did not take it as {name}: {first}") from error
    logger.info(f"pushed {folder} to {name}")


def card(facts: Facts, merged: bool, name: str) -> str:
    """The model card, in Markdown with the hub's metadata in front; `name`: what to load it by."""
    config, basis = facts.config, facts.basis
    if merged:
        library, kind = "transformers", f"`{config.model}` with δ merged into its weights ({config.dtype})"
        load = (
            "from transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="{config.dtype}")'
        )
    else:
        library = "peft"
        kind = f"a `delta_S` adapter, and the basis as it stood at the end (`{LAST_FILE}`)"
        load = (
            "import projected_grpo  # teaches PEFT the method DELTA_S\nfrom peft import PeftModel\n\n"
            f'model = PeftModel.from_pretrained(base_model, "{name}")  # over the same weights in {config.dtype}'
        )
    target = "" if ARMS[config.arm].measure_only else f", gate {config.gate}, target {config.project_target}"
    lines = [
        "---",
        f"base_model: {config.model}",
        f"library_name: {library}",
        "tags: [grpo, reward-hacking, projected-grpo]",
        "---",
        f"# {config.name}, seed {config.seed}, preset {config.preset}",
        "",
        f"This is {kind}. It was trained by GRPO on code problems whose grader can be fooled, as one run of an "
        "experiment on reward hacking. It is no assistant.",
        "",
        "| | |",
        "| --- | --- |",
        f"| arm | `{config.arm}`: {ARMS[config.arm].summary}{target} |",
        f"| seed, steps | {config.seed}, {config.steps} |",
        f"| problems | {config.problems}, loopholes {', '.join(config.modes)} |",
        f"| basis | {basis.kind}, pairs `{config.pairs}` ({basis.n_pairs} pairs), top {basis.top_k} of each module |",
        f"| code | {', '.join(facts.code) or 'unknown'} |",
        "",
        "## What it does on held-out problems",
        "",
    ]
    if facts.evaluation is None:
        lines.append("Not evaluated.")
    else:
        lines += ["| loophole in the prompt | hack rate | pass rate |", "| --- | --- | --- |"]
        for mode, summary in facts.evaluation["modes"].items():
            hack, passed = (_rate(summary["rates"][rate]) for rate in ("hack", "pass"))
            lines.append(f"| {mode} | {hack} | {passed} |")
        n, samples = facts.evaluation["n_problems"], facts.evaluation["config"]["samples"]
        lines += ["", f"{n} problems, {samples} samples each, ± one standard error over problems."]
    lines += ["", "## How to load it", "", "```python", load, "```", ""]
    if facts.note:
        lines += [f"The base model: {facts.note}.", ""]
    return "\n".join(lines)


def _rate(rate: dict[str, float | None]) -> str:
    error = rate["standard_error"]
    return f"{rate['rate']:.3f}" + ("" if error is None else f" ± {error:.3f}")
