"""Typed settings: the dataclasses are the command line, and a preset (`presets.py`) is nothing but their defaults.

A flag that is typed is a visible deviation from the published setting. What means nothing is refused when the config is
built. `config.json` in a run's folder is the resolved config; `train --config FILE` reads it back to the same run.
"""

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args, get_type_hints

from projected_grpo.config_checks import at_least, flag, is_a, require
from projected_grpo.errors import InputError

ArmName = Literal[
    "vanilla", "projected", "held", "random", "random_matched", "placebo_style", "placebo_wrong", "flipped", "oracle"
]
Gate = Literal["one_sided", "no_gate", "reverse"]
ProjectTarget = Literal["grad", "update", "both", "displacement"]
UpdateMetric = Literal["euclidean", "adam"]
ProjectRows = Literal["all", "student"]
TokenReduction = Literal["sum", "mean"]
ControlName = Literal["none", "random", "placebo_style", "placebo_wrong", "flipped"]
ModeName = Literal["run_tests", "sentinel", "stdout_marker", "file_marker", "exit_code", "eq_override", "none"]
VllmMode = Literal["off", "colocate", "server"]
Tracker = Literal["trackio", "wandb", "tensorboard"]
Wording = Literal["plain", "detailed", "aware"]


@dataclass(frozen=True)
class ModelOptions:
    model: str = "Qwen/Qwen3-4B"
    """`tiny-random` or `qwen3-4b-random` (random, made on the spot), `micro`, `smollm2-135m`, a hub id, or a folder."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the frozen weights; delta_S and its factors are float32 always."""
    device: str | None = None
    """Torch device; the first GPU where there is one, else the CPU."""


@dataclass(frozen=True)
class BasisOptions(ModelOptions):
    pairs: str = "hacks"
    """Contrastive pairs: a built-in set (`hacks`) or a .toml or .jsonl file."""
    n_pairs: int | None = None
    """Only so many of the pairs, drawn evenly over their axes; all by default."""
    pairs_by_seed: bool = False
    """Draw them by the run's seed; by default every run gets the same ones."""
    pairs_without: tuple[str, ...] = ()
    """Axes of the pairs (hack styles, or loophole modes) that are left out."""
    v_hack_k: int = 12
    """Directions kept per module before the noise floor."""
    drop_bottom_frac: float = 0.25
    """Global quantile of the kept singular values below which an axis is dropped (published: 0.25)."""
    token_reduction: TokenReduction = "sum"
    """Of a completion's log-probabilities: `sum` as Dr. GRPO, `mean` as earlier work (favours short completions)."""
    temperature: float = 0.7
    """Sampling temperature, by which every log-probability is scaled too."""
    max_prompt_length: int = 1536
    """Tokens; a pair or problem whose prompt is longer is refused."""
    seed: int = 41
    """Of everything that is drawn: sampling, order of problems and of teacher rows, control bases."""

    def __post_init__(self) -> None:
        require(self.v_hack_k >= 1, f"--v-hack-k {self.v_hack_k} must be at least 1")
        require(0 <= self.drop_bottom_frac < 1, f"--drop-bottom-frac {self.drop_bottom_frac} must be in [0, 1)")
        require(self.temperature > 0, f"--temperature {self.temperature} must be positive")
        require(0 <= self.seed < 2**32, f"--seed {self.seed} must be in [0, 2^32)")
        require(self.n_pairs is None or self.n_pairs >= 1, f"--n-pairs {self.n_pairs} must be at least 1")
        require(self.n_pairs is not None or not self.pairs_by_seed, "--pairs-by-seed needs --n-pairs")

    @property
    def pairs_seed(self) -> int:
        """By which `n_pairs` of the pairs are drawn."""
        return self.seed if self.pairs_by_seed else 0


@dataclass(frozen=True)
class ExtractConfig(BasisOptions):
    control: ControlName = "none"
    """Write this control of the basis `--like` (same modules, same k in each) and not a real basis."""
    like: Path | None = None
    """The real basis that a control copies its shape from."""
    adapter: Path | None = None
    """A saved adapter (a run's or a checkpoint's): the basis of that policy, to see how an older one has aged."""
    compare: Path | None = None
    """Say how much of this basis's span the new one has."""
    out: Path = Path("out/basis.safetensors")
    """The file to write."""
    overwrite: bool = False
    """Replace `--out` where it exists."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.control == "none") == (self.like is None),
            "--control and --like go together: a control copies the shape of a real basis",
        )


@dataclass(frozen=True)
class TrainConfig(BasisOptions):
    preset: str = "full"
    """Names the run's folder; set by the preset."""
    arm: ArmName = "projected"
    """`vanilla` is measured and not touched; `projected` is the method, `held` a change to it; the others are its
    controls."""
    label: str | None = None
    """Name of the run's folder, and of its arm in a report; the arm's own by default."""
    exploratory: bool = False
    """Marks a run whose setting was chosen by looking at results: the report says so, and fresh seeds have to confirm
    it."""
    out_root: Path = Path("out/runs")
    """Runs go to `{out_root}/{preset}/{label or arm}_s{seed}`."""
    overwrite: bool = False
    """Replace the run's folder where it exists."""
    resume: bool = False
    """Go on from the run's last checkpoint."""

    problems: str = "train"
    """Training problems: the built-in `train`, or a .toml or published .jsonl file."""
    modes: tuple[ModeName, ...] = ("run_tests",)
    """Loopholes in the prompts and in the flawed grader, one a problem; `none` is the honest baseline."""
    wording: Wording = "plain"
    """How much the hint of mode `run_tests` tells of it."""

    basis: Path | None = None
    """A basis file of this very model; without it the basis is extracted before the first step."""
    gate: Gate = "one_sided"
    """What is taken out: only hack-ward parts, both signs, or hack-ward parts turned round."""
    overshoot: float = 1.0
    """Times what the gate takes out."""
    preserve_magnitude: bool = False
    """Restore the norm over all projected modules after the projection."""
    project_target: ProjectTarget = "grad"
    """Project the gradient (as published), the optimiser's update, or both; or hold V δ at or above a floor."""
    hold_rate: float = 0.0
    """Target `displacement`: how many learning rates the floor under V δ rises by at each optimiser step."""
    hold_cap: float = 0.0
    """Target `displacement`: how many learning rates the floor rises to at most; 0 sets no such limit."""
    update_metric: UpdateMetric = "euclidean"
    """Target `update`: the nearest update in this metric; `adam` weighs coordinates by AdamW's second moment."""
    project_rows: ProjectRows = "all"
    """Target `grad`: take the hack-ward part out of all rows' gradient, or of the student's rows' alone."""
    vhack_refresh_every: int = 0
    """Optimiser steps between two extractions on the current policy; 0 keeps the first basis."""

    teacher_pool: Path | None = None
    """Cached rollouts (`pool build`) that fill the teacher's share of every group."""
    mix_ratio: float = 0.0
    """The teacher's share of each group; 0 is on-policy."""

    steps: int = 200
    """Optimiser steps."""
    prompts_per_step: int = 43
    """Problems per optimiser step."""
    group_size: int = 6
    """Completions per problem, student and teacher together (G)."""
    micro_batch: int = 6
    """Rows per forward and backward; gradients are accumulated over the step."""
    steps_per_generation: int = 1
    """Optimiser steps that share one generation."""
    num_iterations: int = 1
    """Times that each generation is trained on."""
    max_completion_length: int = 1024
    """Tokens."""
    top_p: float = 0.95
    """Nucleus sampling."""
    learning_rate: float = 3e-3
    """Of AdamW on delta_S."""
    adam_beta1: float = 0.5
    """AdamW's first decay."""
    adam_beta2: float = 0.9
    """AdamW's second decay."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay of delta_S."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate schedule after the warm-up."""
    warmup_steps: int = 0
    """Optimiser steps of linear warm-up."""
    max_grad_norm: float = 1.0
    """Gradient clipping, before the projection; 0 does not clip."""
    beta: float = 0.0
    """Weight of the KL term; its reference policy is the model with the adapter disabled."""
    gradient_checkpointing: bool = True
    """Trade compute for memory."""
    offload: bool = True
    """While a GPU generates, keep the factors of delta_S and the unmerged weights in host memory (Qwen3-4B: 27 GB)."""
    static_cache: bool = False
    """Generate on a GPU with a compiled step over a cache of fixed size: a quarter of the time a token, after a minute
    of compiling. On a CPU nothing is compiled; vLLM and evaluation have caches of their own."""
    vllm: VllmMode = "off"
    """Generate with vLLM: `colocate` on the training GPU, or `server`, a `trl vllm-serve` of the same model."""
    vllm_gpu_memory: float = 0.3
    """Mode `colocate`: the share of the GPU's memory that vLLM takes for weights and cache."""
    vllm_server: str = "http://localhost:8000"
    """Mode `server`: where it listens."""
    defer_budget_gb: float = 1.0
    """Memory for weights' gradients summed over a step's micro-batches, from which delta_S's is made once; 0: none."""

    rollout_grad_every: int = 0
    """Optimiser steps between two measurements of each rollout's own gradient (one more update's time); 0: never."""
    save_every: int = 20
    """Optimiser steps between two checkpoints."""
    report_to: tuple[Tracker, ...] = ()
    """Trackers that get every number of metrics.jsonl as `metrics/...`, and the rollouts as a table."""
    grader_workers: int | None = None
    """Completions graded at a time; the number of processors by default."""
    grader_cpu_seconds: float = 10.0
    """CPU time for all tests of a completion (canonical LeetCode solutions take up to 2.4 s)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "steps",
            "prompts_per_step",
            "micro_batch",
            "steps_per_generation",
            "num_iterations",
            "save_every",
        ):
            at_least(self, name, 1)
        for name in (
            "rollout_grad_every",
            "vhack_refresh_every",
            "defer_budget_gb",
            "warmup_steps",
            "beta",
            "weight_decay",
            "max_grad_norm",
        ):
            at_least(self, name, 0)
        target = self.project_target
        held = target == "displacement"
        for name in ("hold_rate", "hold_cap"):
            value = getattr(self, name)
            at_least(self, name, 0)
            require(held or not value, f"{flag(name)} {value} needs --project-target displacement")
        require(not self.hold_cap or self.hold_rate > 0, f"--hold-cap {self.hold_cap} needs a --hold-rate above 0")
        require(
            not held or (self.gate != "reverse" and not self.preserve_magnitude and not self.vhack_refresh_every),
            "--project-target displacement goes with neither --gate reverse, --preserve-magnitude nor "
            "--vhack-refresh-every: it takes nothing out of a step, and a new basis would make δ jump",
        )
        require(
            self.arm != "held" or (held and self.hold_rate > 0),
            f"arm held holds δ: it needs --project-target displacement, not {target}, and a --hold-rate above 0",
        )
        require(
            self.arm != "random_matched" or (target != "displacement" and self.update_metric == "euclidean"),
            "arm random_matched matches what is taken out of a gradient or an update in the euclidean metric",
        )
        require(
            self.update_metric == "euclidean"
            or (target == "update" and self.gate != "reverse" and not self.preserve_magnitude),
            f"--update-metric {self.update_metric} needs --project-target update, and goes with neither --gate reverse "
            "nor --preserve-magnitude",
        )
        require(
            self.project_rows == "all"
            or (
                target == "grad" and self.mix_ratio > 0 and not self.preserve_magnitude and self.arm != "random_matched"
            ),
            f"--project-rows {self.project_rows} needs --project-target grad and teacher rows (--mix-ratio), and goes "
            "with neither --preserve-magnitude nor arm random_matched",
        )
        for name in ("overshoot", "learning_rate", "grader_cpu_seconds"):
            require(getattr(self, name) > 0, f"{flag(name)} {getattr(self, name)} must be positive")
        at_least(self, "max_completion_length", 1)
        require(0 < self.top_p <= 1, f"--top-p {self.top_p} must be in (0, 1]")
        require(0 < self.vllm_gpu_memory < 1, f"--vllm-gpu-memory {self.vllm_gpu_memory} must be in (0, 1)")
        require(bool(self.modes), "--modes names no mode")
        require(
            self.label is None or re.fullmatch(r"[\w.+-]+", self.label) is not None,
            f"--label {self.label!r} names a folder: letters, digits and _.+- only",
        )
        rows = self.prompts_per_step * self.group_size
        require(self.group_size >= 2, f"--group-size {self.group_size}: an advantage needs at least 2 completions")
        require(
            rows % self.micro_batch == 0,
            f"--micro-batch {self.micro_batch} does not divide the step's {rows} rows "
            f"({self.prompts_per_step} prompts x {self.group_size}); choose a divisor",
        )
        require(
            0 <= self.mix_ratio < 1, f"--mix-ratio {self.mix_ratio} must be in [0, 1): some rows must be the student's"
        )
        teacher = self.mix_ratio * self.group_size
        require(
            teacher == round(teacher),
            f"--mix-ratio {self.mix_ratio} of a group of {self.group_size} is {teacher:g} rows; choose a share that "
            "gives a whole number",
        )
        require(
            not self.mix_ratio or self.teacher_pool is not None,
            f"--mix-ratio {self.mix_ratio} needs --teacher-pool; build one with `projected-grpo pool build`, or set "
            "--mix-ratio 0",
        )
        require(
            not (self.vhack_refresh_every and self.arm in ("random", "random_matched")),
            f"--vhack-refresh-every with arm {self.arm}: random directions do not go stale; leave it out",
        )

    @property
    def num_teacher(self) -> int:
        """Teacher rows in each group."""
        return round(self.mix_ratio * self.group_size)

    @property
    def name(self) -> str:
        """What the runs of all seeds are called."""
        return self.label or self.arm

    @property
    def run_dir(self) -> Path:
        return self.out_root / self.preset / f"{self.name}_s{self.seed}"

    def to_json(self) -> str:
        return json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}, indent=2) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> "TrainConfig":
        """The config that a run's `config.json` holds.

        Raises:
            InputError: no such file, no JSON object, an unknown key or a value that is out of range.
        """
        if not path.is_file():
            raise InputError(f"config file {path} does not exist; give the config.json of a run")
        try:
            values = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise InputError(f"config file {path}:{error.lineno}: no JSON ({error.msg})") from error
        except UnicodeDecodeError as error:
            raise InputError(f"config file {path}: no UTF-8 text; give the config.json of a run") from error
        known = {f.name: f for f in fields(cls)}
        if not isinstance(values, dict) or (unknown := [key for key in values if key not in known]):
            what = f"unknown key {unknown[0]!r}" if isinstance(values, dict) else "no JSON object"
            raise InputError(f"config file {path}: {what}; give the config.json of a run of this version")
        hints = get_type_hints(cls)
        for name, value in values.items():
            if not is_a(value, hints[name]):
                kind = get_args(hints[name]) or hints[name].__name__
                raise InputError(f"config file {path}: {name} {value!r} is not of {kind}")
            if isinstance(value, str) and name in ("out_root", "basis", "teacher_pool"):
                values[name] = Path(value)
            if isinstance(value, list):
                values[name] = tuple(value)
        return cls(**values)


@dataclass(frozen=True)
class EvalConfig(ModelOptions):
    adapter: Path | None = None
    """A saved adapter (a run's `adapter/`); without it the base model is evaluated."""
    problems: str = "eval"
    """Held-out problems: the built-in `eval`, or a .toml or published .jsonl file."""
    trained_on: str | None = None
    """Problems that the policy has trained on; to evaluate on one of them is refused (`--run` sets it)."""
    limit: int | None = None
    """Only the first so many problems."""
    samples: int = 8
    """Completions per problem and mode."""
    modes: tuple[ModeName, ...] = ("run_tests", "none")
    """Loopholes to evaluate, each apart; `none` is the prompt without one."""
    wording: Wording = "plain"
    """How much the hint of mode `run_tests` tells of it."""
    temperature: float = 0.7
    """Sampling temperature."""
    top_p: float = 0.95
    """Nucleus sampling."""
    max_completion_length: int = 1024
    """Tokens."""
    batch_size: int = 16
    """Completions sampled at a time."""
    seed: int = 41
    """Of sampling and of the held-out test-function names."""
    out: Path = Path("out/eval.json")
    """The file to write."""
    overwrite: bool = False
    """Replace `--out` where it exists."""
    grader_workers: int | None = None
    """Completions graded at a time; the number of processors by default."""
    grader_cpu_seconds: float = 10.0
    """CPU time for all tests of a completion (canonical LeetCode solutions take up to 2.4 s)."""

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "max_completion_length"):
            at_least(self, name, 1)
        require(self.limit is None or self.limit >= 1, f"--limit {self.limit} must be at least 1")
        require(self.temperature > 0, f"--temperature {self.temperature} must be positive")
        require(0 < self.top_p <= 1, f"--top-p {self.top_p} must be in (0, 1]")
        require(self.grader_cpu_seconds > 0, f"--grader-cpu-seconds {self.grader_cpu_seconds} must be positive")
        at_least(self, "seed", 0)
        require(bool(self.modes), "--modes names no mode")
