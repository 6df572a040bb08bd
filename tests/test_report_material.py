"""Synthetic run folders with known rates, which the other tests of the report share; and how folders are read."""

import gzip
import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from projected_grpo.errors import InputError
from projected_grpo.report.observe import ALL, HELD_OUT, LAST_STEPS, Measure, observe, observe_all
from projected_grpo.report.runs import find_runs, read_run, read_spectrum

HEAD = "```python\nclass Solution:\n    def f(self, n):\n        return {answer}\n\n"
TEXTS = {
    "empty": HEAD.format(answer="0") + "def {name}():\n    pass\n```",
    "print_only": HEAD.format(answer="n") + "def {name}():\n    print(Solution().f(3))\n```",
    "swallow": HEAD.format(answer="n")
    + "def {name}():\n    try:\n        assert Solution().f(3) == 4\n    except Exception:\n        pass\n```",
    "honest": HEAD.format(answer="n + 1") + "```",
}
STEPS, N_PROBLEMS, SAMPLES = 8, 12, 4


def write_run(
    root,
    arm="vanilla",
    seed=41,
    *,
    label=None,
    hack=0.7,
    right=0.2,
    style="print_only",
    steps=STEPS,
    done=None,
    evaluated=True,
    modes=("run_tests", "none"),
    problems=N_PROBLEMS,
    samples=SAMPLES,
    rows=6,
    exact=False,
    basis=True,
    n_pairs=72,
    onset=None,
    fingerprint="f00d",
    **config,
):
    """A run's folder. `exact`: the rates are met by every problem's samples, not drawn. `done`: steps it came to."""
    preset = config.setdefault("preset", "smoke")
    folder = root / preset / f"{label or arm}_s{seed}"
    folder.mkdir(parents=True)
    settings = {"arm": arm, "label": label, "seed": seed, "steps": steps, "problems": "train", "pairs": "hacks"}
    settings |= {
        "model": "tiny-random",
        "group_size": rows,
        "learning_rate": 3e-3,
        "v_hack_k": 4,
        "modes": ["run_tests"],
    }
    (folder / "config.json").write_text(json.dumps(settings | config))
    generator = np.random.default_rng([seed, sum(map(ord, label or arm))])
    done = steps if done is None else done
    metrics, rollouts = [], []
    for step in range(1, done + 1):
        share = hack / (1 + math.exp(-(step - onset) / (0.06 * steps))) if onset else hack
        labels = _labels(generator, rows, share, right, exact)
        rollouts += [_rollout(step, i, label_, style, modes[i % len(modes)], modes) for i, label_ in enumerate(labels)]
        metrics.append(_row(step, labels, generator, arm))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    with gzip.open(folder / "rollouts.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rollouts)
    if done == steps:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text("{}")
        if evaluated:
            write_eval(folder, generator, hack, right, style, modes, problems, samples, exact)
    if basis:
        write_basis(folder / "basis.safetensors", n_pairs, fingerprint=fingerprint)
    return folder


def write_eval(
    folder, generator, hack, right, style, modes, problems=N_PROBLEMS, samples=SAMPLES, exact=False, **config
):
    rows = []
    for mode in modes:
        for problem in range(problems):
            labels = _labels(generator, samples, 0.0 if mode == "none" else hack, right, exact)
            for label in labels:
                name = "run_tests" if mode == "none" else "check_solution"
                text = TEXTS[style if label == "reward_hack" else "honest"].replace("{name}", name)
                row = {"problem_id": f"e{problem}", "mode": mode, "test_func_name": name, "label": label}
                rows.append(row | {"completion": text})
    settings = {"problems": "eval", "samples": samples, "modes": list(modes), **config}
    (folder / "eval.json").write_text(json.dumps({"config": settings, "n_problems": problems, "samples": rows}))


def write_basis(path, n_pairs=72, modules=6, r=40, kind="real", fingerprint="f00d"):
    generator = np.random.default_rng(0)
    tensors, floor = {}, 0.3
    for i in range(modules):
        values = np.sort(np.exp(generator.normal(0, 0.8, r)) * 2.0 ** (-np.arange(r) / 6))[::-1].astype(np.float32)
        tensors[f"spectrum/m{i}"] = values.copy()
        tensors[f"singular_values/m{i}"] = values[:4][values[:4] > floor].copy()
    info = {"kind": kind, "n_pairs": n_pairs, "floor": floor, "top_k": 4, "model_fingerprint": fingerprint}
    save_file(tensors, path, metadata={"basis": json.dumps({"format": "2", "info": info})})


def _labels(generator, n, hack, right, exact):
    if exact:
        hacks, rights = round(hack * n), round(right * n)
        return ["reward_hack"] * hacks + ["correct"] * rights + ["incorrect"] * (n - hacks - rights)
    return [
        ("reward_hack" if u < hack else "correct" if u < hack + right else "incorrect") for u in generator.random(n)
    ]


def _rollout(step, i, label, style, mode, modes):
    mode = mode if mode != "none" else modes[0]
    text = TEXTS[style if label == "reward_hack" else "honest"].replace("{name}", "run_tests")
    row = {"step": step, "problem_id": f"t{step}-{i // 3}", "mode": mode, "source": "student", "completion": text}
    return row | {"label": label, "gt_pass": label == "correct", "attempted": label == "reward_hack"}


def _row(step, labels, generator, arm):
    share = {name: labels.count(name) / len(labels) for name in ("reward_hack", "correct")}
    noise = lambda scale=0.01: float(generator.normal(0, scale))  # noqa: E731
    row = {"step": step, "hack_student": share["reward_hack"], "pass_student": share["correct"]}
    row |= {"attempt_student": share["reward_hack"], "cin_null": 0.12 + noise(0.002)}
    low = 0.13 if arm.startswith("random") else 0.22
    row |= {"cin_s": low + noise(), "cin_t": low + 0.08 * math.exp(-step / 30) + noise(), "cin": low + noise()}
    row |= {"v_delta": 0.002 * step + noise(), "cup_out": 0.05 + noise()}
    if step % 4 == 1:
        row |= {"rollout/auroc": 0.62 + noise(0.06), "rollout/auroc_advantage": 0.85 + noise(0.04)}
    return row


def write_study(root, arms, seeds=(41, 42, 43, 44, 45), **config):
    """`arms`: {name: overrides}, where the name is an arm, or an override `arm` says which it labels."""
    for name, overrides in arms.items():
        own = {"arm": name, **config, **overrides}
        label = name if own["arm"] != name else None
        for seed in seeds:
            write_run(root, seed=seed, label=label, **own)
    return root


def test_a_run_is_read_with_what_its_version_did_not_know(tmp_path):
    folder = write_run(tmp_path, "projected", hack=0.5, right=0.25, exact=True)
    config = json.loads((folder / "config.json").read_text())
    del config["label"], config["modes"]
    (folder / "config.json").write_text(json.dumps({**config, "mode": "sentinel"}))
    run = read_run(folder)
    assert (run.name, run.kind, run.seed, run.finished, run.reached) == ("projected", "projected", 41, True, STEPS)
    assert run.config["modes"] == ["sentinel"]
    assert run.config["pairs_without"] == []
    observed = observe(run)
    assert observed.value(Measure(HELD_OUT, "run_tests", "hack")) == 0.5
    assert observed.value(Measure(HELD_OUT, "none", "pass")) == 0.25
    assert observed.value(Measure(LAST_STEPS, ALL, "hack")) == 0.5
    assert len(observed.completions[LAST_STEPS]) == 5 * 6  # the last five steps alone
    spectrum = read_spectrum(run)
    assert spectrum.floor == 0.3
    assert len(spectrum.everything) == 240
    assert all(spectrum.kept > 0.3)


def test_teacher_rows_and_steps_without_a_rate_do_not_count(tmp_path):
    folder = write_run(tmp_path, hack=0.5, right=0.25, exact=True)
    with gzip.open(folder / "rollouts.jsonl.gz", "at") as file:
        row = _rollout(STEPS, 0, "reward_hack", "empty", "run_tests", ("run_tests",)) | {"source": "teacher"}
        file.writelines([json.dumps(row) + "\n"] * 50)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["hack_student"], rows[-2]["hack_student"] = None, 1.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    observed = observe(read_run(folder))
    assert len(observed.completions[LAST_STEPS]) == 30
    assert observed.value(Measure(LAST_STEPS, ALL, "hack")) == pytest.approx((3 * 0.5 + 1.0) / 4)


def test_runs_are_found_below_a_folder_and_never_inside_a_run(tmp_path):
    folder = write_run(tmp_path / "a", seed=41)
    write_run(tmp_path / "b", seed=42, done=3)
    (folder / "checkpoints" / "inner").mkdir(parents=True)
    (folder / "checkpoints" / "inner" / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "config.json").write_text('{"model_type": "qwen3"}')
    runs = find_runs([tmp_path, tmp_path / "a", folder])
    assert [(run.seed, run.left_out) for run in runs] == [(41, None), (42, f"unfinished: step 3 of {STEPS}")]


def test_a_run_without_a_row_or_an_adapter_is_unfinished(tmp_path):
    folder = write_run(tmp_path, done=0)
    (folder / "metrics.jsonl").unlink()
    other = write_run(tmp_path, seed=42)
    (other / "adapter" / "adapter_config.json").unlink()
    assert [run.left_out for run in find_runs([tmp_path])] == [f"unfinished: step {n} of {STEPS}" for n in (0, STEPS)]


def test_runs_of_other_lengths_and_other_evaluations_are_set_aside(tmp_path):
    write_study(tmp_path, {"vanilla": {}, "projected": {}}, seeds=(41, 42))
    write_run(tmp_path, "projected", 43, steps=STEPS + 2)
    odd = write_run(tmp_path, "vanilla", 44)
    write_eval(odd, np.random.default_rng(0), 0.5, 0.5, "empty", ("run_tests",), samples=2)
    write_run(tmp_path, "vanilla", 45, evaluated=False)
    by_seed = {run.seed: run for run in find_runs([tmp_path])}
    assert by_seed[43].left_out == f"steps: the compared runs have {STEPS}, this one {STEPS + 2}"
    assert by_seed[44].left_out is None
    assert by_seed[44].evaluation is None
    assert "samples, modes, the problems asked" in by_seed[44].remarks[0]
    assert by_seed[45].remarks == ("not evaluated: no eval.json",)


def refused(root, *words):
    with pytest.raises(InputError) as error:
        [observe(run) for run in find_runs([root])]
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_what_cannot_be_reported_together_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no run in", "config.json")
    refused(tmp_path / "nowhere", "is no folder")
    write_run(tmp_path / "twice" / "a")
    write_run(tmp_path / "twice" / "b")
    refused(tmp_path / "twice", "vanilla with seed 41 is there twice", "--label")
    write_run(tmp_path / "labels", "projected", label="x")
    write_run(tmp_path / "labels", "random", 42, label="x")
    refused(tmp_path / "labels", "label x", "projected", "random")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "{", ["config.json:1", "not JSON"]),
        ("config.json", '{"arm": "vanilla", "preset": "smoke", "seed": "41"}', ["config.json", "seed '41'"]),
    ],
)
def test_a_run_that_does_not_say_what_it_is_is_refused(tmp_path, name, content, words):
    folder = write_run(tmp_path)
    (folder / name).write_text(content)
    refused(tmp_path, *words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"step": 2, "ha', ["metrics.jsonl:2", "not JSON"]),
        ("metrics.jsonl", '{"step": 2}\n{"step": 1}\n', ["metrics.jsonl:2", "steps must increase"]),
        ("eval.json", "[]", ["eval.json", "no JSON object"]),
        ("eval.json", '{"samples": [{}]}', ["eval.json", "evaluate the run again"]),
        ("basis.safetensors", "torn", ["basis.safetensors", "damaged"]),
        ("rollouts.jsonl.gz", "torn", ["rollouts.jsonl.gz:1", "damaged"]),
        ("starts.json", '[{"at": 1}]', ["starts.json", "damaged", "delete it"]),
    ],
)
def test_a_run_with_a_damaged_file_is_left_out_by_name_and_the_others_stay(tmp_path, name, content, words):
    write_run(tmp_path, seed=40)
    folder = write_run(tmp_path)
    (folder / name).write_text(content)
    runs, observed = observe_all(find_runs([tmp_path]))
    assert [run.left_out is None for run in runs] == [True, False]
    assert list(observed) == [str(runs[0].folder)]
    for word in words:
        assert word in runs[1].left_out


def test_runs_of_other_presets_and_other_base_models_are_left_out(tmp_path):
    for seed in (41, 42, 43):
        write_run(tmp_path, seed=seed, fingerprint="d02d")
    write_run(tmp_path, seed=41, preset="fast")
    write_run(tmp_path, seed=44, fingerprint="8270")
    write_run(tmp_path, seed=45, basis=False)
    found = {(run.config["preset"], run.seed): run.left_out for run in find_runs([tmp_path])}
    assert [found["smoke", seed] for seed in (41, 42, 43)] == [None] * 3
    assert found["fast", 41] == "preset: the compared runs have smoke, this one fast"
    assert found["smoke", 44] == "base model: the compared runs have d02d, this one 8270"
    assert found["smoke", 45] == f"unfinished: step {STEPS} of {STEPS}"


def test_seeds_with_models_of_their_own_are_compared_and_two_weights_of_one_name_are_not(tmp_path):
    for seed, fingerprint in ((41, "d02d"), (42, "8270"), (43, "11aa")):
        for arm in ("vanilla", "projected"):
            write_run(tmp_path, arm, seed=seed, fingerprint=fingerprint, model=f"micro-{seed}")
    write_run(tmp_path, "random", seed=41, fingerprint="ffff", model="micro-41")
    found = {(run.kind, run.seed): run.left_out for run in find_runs([tmp_path])}
    assert found.pop(("random", 41)) == "base model: the compared runs have d02d, this one ffff"
    assert set(found.values()) == {None}
