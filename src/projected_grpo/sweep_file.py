"""What to run: a sweep file, or a preset with arms and seeds, into the configs of its runs.

A sweep file is TOML: `preset`, `seeds`, `out_root`, a table `[common]` and one `[[run]]` for each run, both of
`TrainConfig`'s fields, and a table `[eval]` of `EvalConfig`'s. `{seed}` in a `model` stands for the run's seed, so
that each seed may have a base model of its own. Everything is checked before anything starts; what is wrong is named
with its file and entry. Left out on purpose: grids; a run that is not written down is not run.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from projected_grpo.config import EvalConfig, TrainConfig
from projected_grpo.config_checks import is_a
from projected_grpo.errors import InputError
from projected_grpo.presets import of_arm, preset_defaults
from projected_grpo.run_state import evaluation_of
from projected_grpo.sources import pairs_selected, problems_of

OUT_ROOT = Path("out/runs")
TOP_KEYS = {"preset": str, "seeds": list, "out_root": str, "common": dict, "run": list, "eval": dict}
ELSEWHERE = {
    "preset": "`preset` stands at the top of the file, once",
    "seed": "list `seeds` at the top of the file",
    "out_root": "`out_root` stands at the top of the file",
    "resume": "a sweep resumes by itself what was interrupted",
    "overwrite": "a sweep never replaces another run; move the folder away",
}
OF_THE_RUN = ("adapter", "out", "overwrite", "trained_on", "model", "dtype", "device")
DECIDE_BASIS = ("model", "dtype", "v_hack_k", "drop_bottom_frac", "token_reduction", "temperature", "max_prompt_length")


@dataclass(frozen=True)
class Sweep:
    """Runs to do, in order, each with how it is evaluated."""

    runs: tuple[tuple[TrainConfig, EvalConfig], ...]
    folder: Path
    """`{out_root}/{preset}`, where all of it lies."""


def read_sweep(path: Path, seeds: Sequence[int] | None = None, out_root: Path | None = None) -> Sweep:
    """The runs that a sweep file asks for; `seeds` and `out_root` in the file's place where given."""
    values = _toml(path)
    for key, value in values.items():
        if key not in TOP_KEYS:
            raise InputError(f"{path}: unknown key {key!r}; use {', '.join(TOP_KEYS)}")
        if type(value) is not TOP_KEYS[key]:
            raise InputError(f"{path}: {key} must be {_name(TOP_KEYS[key])}, not {value!r}")
    if "preset" not in values:
        raise InputError(f"{path}: no preset; name one")
    given = values.get("seeds", []) if seeds is None else seeds
    if not given or not all(type(seed) is int for seed in given):
        raise InputError(f"{path}: seeds must be a list of whole numbers, and not empty; or give --seeds")
    if not values.get("run") or not all(isinstance(run, dict) for run in values["run"]):
        raise InputError(f"{path}: no [[run]]; write one for each run, `arm` in it at least")
    root = out_root or Path(values.get("out_root", OUT_ROOT))
    common = _typed(TrainConfig, values.get("common", {}), f"{path}: [common]", ELSEWHERE)
    refused = dict.fromkeys(OF_THE_RUN, "it is the run's own")
    changes = _typed(EvalConfig, values.get("eval", {}), f"{path}: [eval]", refused)
    settings = []
    for number, run in enumerate(values["run"], start=1):
        where = f"{path}: [[run]] {number}" + (f" ({run['label']})" if isinstance(run.get("label"), str) else "")
        settings.append((where, common | _typed(TrainConfig, run, where, ELSEWHERE)))
    return _sweep(str(path), values["preset"], settings, given, root, changes)


def sweep_of(
    preset: str,
    arms: Sequence[str],
    seeds: Sequence[int],
    out_root: Path | None = None,
    problems: str | None = None,
    teacher_pool: Path | None = None,
) -> Sweep:
    """The runs of a preset: every arm with every seed."""
    if not arms:
        raise InputError("--arms names no arm; give them as --arms vanilla,projected")
    if not seeds:
        raise InputError("--seeds names no seed; give them as --seeds 41,42,43")
    common: dict[str, Any] = {} if problems is None else {"problems": problems}
    common |= {} if teacher_pool is None else {"teacher_pool": teacher_pool}
    settings = [("--arms", common | _typed(TrainConfig, {"arm": arm}, "--arms", ELSEWHERE)) for arm in arms]
    return _sweep("sweep", preset, settings, seeds, out_root or OUT_ROOT, {})


def _sweep(
    source: str,
    preset: str,
    settings: list[tuple[str, dict[str, Any]]],
    seeds: Sequence[int],
    out_root: Path,
    changes: dict[str, Any],
) -> Sweep:
    with _named(source):
        defaults = preset_defaults(preset)
    if len(set(seeds)) < len(seeds):
        raise InputError(f"{source}: seeds {', '.join(map(str, seeds))} name one twice; leave it out")
    runs = []
    for seed in seeds:
        labels = set()
        for where, values in settings:
            with _named(where):
                config = replace(defaults, seed=seed, out_root=out_root)
                config = replace(of_arm(config, values.get("arm", config.arm)), **values)
                config = replace(config, model=config.model.replace("{seed}", str(seed)))
                problems_of(config.problems)
                if config.basis is None:
                    config = replace(config, basis=basis_path(config))
            if config.name in labels:
                raise InputError(f"{where}: a second run called {config.name!r}; give one of them a `label` of its own")
            labels.add(config.name)
            with _named(f"{source}: [eval]"):
                evaluation = evaluation_of(config, config.run_dir, changes)
                problems_of(evaluation.problems)
            runs.append((config, evaluation))
    _check_pools(source, [config for config, _ in runs])
    return Sweep(tuple(runs), out_root / defaults.preset)


def basis_path(config: TrainConfig) -> Path:
    """Where a sweep keeps the real basis of `config`, named by what decides it, the pairs' own texts included."""
    decides = {name: getattr(config, name) for name in DECIDE_BASIS}
    decides["pairs"] = _pairs_hash(config.pairs, config.pairs_without, config.n_pairs, config.pairs_seed)
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return config.out_root / config.preset / "bases" / f"{digest[:12]}.safetensors"


@lru_cache
def _pairs_hash(pairs: str, without: tuple[str, ...], n: int | None, seed: int) -> str:
    return pairs_selected(pairs, without, n, seed).sha256


def _check_pools(source: str, configs: Sequence[TrainConfig]) -> None:
    """One pool file serves one set of problems under one list of modes."""
    seen: dict[Path, TrainConfig] = {}
    for config in configs:
        if not config.num_teacher:
            continue
        other = seen.setdefault(config.teacher_pool, config)
        if (other.problems, other.modes) != (config.problems, config.modes):
            what = "problems" if other.problems != config.problems else "modes"
            raise InputError(
                f"{source}: {other.name} and {config.name} share teacher_pool {config.teacher_pool} and have "
                f"other {what}; give each a teacher_pool of its own"
            )


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"sweep file {path} cannot be read ({error}); give a .toml file, as in sweeps/") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"sweep file {path}: no TOML ({error}); mend it") from error


def _typed(kind: type, values: dict[str, Any], where: str, refused: dict[str, str]) -> dict[str, Any]:
    """Values as TOML has them, as the fields of `kind` are typed."""
    hints = get_type_hints(kind)
    typed = {}
    for name, value in values.items():
        if name in refused:
            raise InputError(f"{where}: {name} has no place here: {refused[name]}")
        if name not in hints:
            raise InputError(f"{where}: unknown key {name!r}; keys are the fields of {kind.__name__}")
        if not is_a(value, hints[name]):
            raise InputError(f"{where}: {name} {value!r} is not {_name(hints[name])}")
        typed[name] = _converted(value, hints[name])
    return typed


def _converted(value: Any, hint: Any) -> Any:
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    return float(value) if float in kinds else value


def _name(hint: Any) -> str:
    """A field's type in words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list, each {_name(get_args(hint)[0])}"
    if isinstance(hint, UnionType):
        return " or ".join(_name(part) for part in get_args(hint) if part is not type(None))
    words = {str: "text", Path: "a path", int: "a whole number", float: "a number", bool: "true or false"}
    return words.get(hint, {list: "a list", dict: "a table"}.get(hint, str(hint)))


@contextmanager
def _named(where: str) -> Iterator[None]:
    """The same fault, with the file and the entry in front."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
