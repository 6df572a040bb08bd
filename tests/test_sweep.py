"""`sweep`: what it plans and refuses, what it skips and takes up again, and that one run's end stops nothing else."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from projected_grpo.cli import main
from projected_grpo.errors import InputError, RunFault, RunInterrupted
from projected_grpo.paths import seal
from projected_grpo.presets import preset_defaults
from projected_grpo.run_state import LAST_FILE, locked, state_of
from projected_grpo.sweep import sweep
from projected_grpo.sweep_file import read_sweep, sweep_of
from projected_grpo.sweep_watch import last_rows
from projected_grpo.sweep_workers import Interrupts, LocalLauncher, environment_of, process_context, run_all

SWEEPS = Path(__file__).resolve().parents[1] / "sweeps"
FILE = """
preset = "smoke"
seeds = [41, 42]
out_root = "OUT"
[common]
steps = 4
[[run]]
arm = "vanilla"
[[run]]
label = "halfway"
arm = "projected"
overshoot = 1
[eval]
samples = 2
"""


@pytest.fixture
def sweep_file(tmp_path):
    path = tmp_path / "sweep.toml"

    def write(change=lambda text: text):
        path.write_text(change(FILE.replace("OUT", str(tmp_path / "out"))))
        return path

    return write


# --- jobs that stand in for a run, called in a process of their own ---


def finish(config, evaluation):
    """What a finished run leaves."""
    folder = config.run_dir
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json())
    row = {"hack_student": 0.25, "pass_student": 0.5}
    rows = [json.dumps({"step": step, **row}) + "\n" for step in range(1, config.steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(rows))
    for name in ("adapter/adapter_config.json", LAST_FILE):
        (folder / name).write_text("{}")
    rates = {name: {"rate": rate} for name, rate in (("hack", 0.125), ("pass", 0.75))}
    evaluated = {"config": json.loads(json.dumps(asdict(evaluation), default=str))}
    (folder / "eval.json").write_text(
        json.dumps(evaluated | {"modes": {m: {"rates": rates} for m in evaluation.modes}})
    )


WANTED = ("OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_")


def tries(task):
    """How often this run was begun, this time included."""
    path = task.log.with_suffix(".tries")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f"{os.getpid()} {time.monotonic()} {' '.join(str(os.environ.get(name)) for name in WANTED)}\n")
    return len(path.read_text().splitlines())


def good(task):
    tries(task)
    print("said by", task.name)
    os.system("echo said by a child")
    finish(task.config, task.evaluation)


def nothing(task):
    pass


def killed_once(task):
    if tries(task) == 1 and task.config.arm == "projected" and task.config.seed == 41:
        os.kill(os.getpid(), signal.SIGKILL)
    finish(task.config, task.evaluation)


def bad(task):
    tries(task)
    if task.config.arm == "vanilla" and task.config.seed == 41:
        raise ValueError("the sky\nhas fallen")
    finish(task.config, task.evaluation)


def refusing(task):
    raise InputError("pool x was graded by another version; build it anew")


def interrupted(task):
    """Ctrl-C, which reaches the sweep and the run alike."""
    tries(task)
    os.kill(int((task.config.out_root / "pid").read_text()), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def terminated(task):
    """SIGTERM, which reaches the sweep alone."""
    tries(task)
    os.kill(int((task.config.out_root / "pid").read_text()), signal.SIGTERM)
    time.sleep(60)


def stubborn(task):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for _ in range(2):
        os.kill(int((task.config.out_root / "pid").read_text()), signal.SIGINT)
        time.sleep(0.2)
    time.sleep(60)


def slow(task):
    tries(task)
    time.sleep(1.0)
    finish(task.config, task.evaluation)
    tries(task)


def go(plan, job, jobs=2, preparation=nothing, **kwargs):
    sweep(
        plan,
        jobs,
        job=job,
        preparation=preparation,
        preload=["pytest", "projected_grpo.cli", "projected_grpo.sweep"],
        **kwargs,
    )


def plan_of(tmp_path, arms=("vanilla", "projected"), seeds=(41, 42)):
    return sweep_of("smoke", arms, seeds, out_root=tmp_path / "out")


def log_of(run):
    config, _ = run
    return config.run_dir.parent / "logs" / f"{config.run_dir.name}.log"


def tries_of(run):
    return [line.split() for line in log_of(run).with_suffix(".tries").read_text().splitlines()]


# --- what is planned, and refused ---


@pytest.mark.parametrize(
    ("name", "runs", "bases"),
    [
        ("replicate_quick", 25, 1),
        ("replicate", 80, 1),
        ("replicate_smol", 12, 2),
        ("leave_one_style_out", 14, 6),
        ("leave_one_mode_out", 16, 7),
        ("knobs", 72, 56),
        ("hold_rate", 22, 1),
        ("adam", 32, 8),
        ("teacher_rows", 56, 8),
        ("changes", 72, 1),
        ("bases", 64, 8),
        ("floor", 56, 24),
    ],
)
def test_the_sweeps_that_come_with_the_project(name, runs, bases):
    plan = read_sweep(SWEEPS / f"{name}.toml")
    preset = "smol" if name.endswith("smol") else "micro"
    assert len(plan.runs) == runs
    assert len({config.basis for config, _ in plan.runs}) == bases
    assert plan.folder == Path("out") / name.replace("_", "-") / preset
    assert {evaluation.problems for _, evaluation in plan.runs} == {f"{preset}-eval"}


def test_a_file_gives_the_presets_settings_but_for_what_it_says(sweep_file, tmp_path):
    plan = read_sweep(sweep_file())
    assert [config.run_dir.name for config, _ in plan.runs] == [
        "vanilla_s41",
        "halfway_s41",
        "vanilla_s42",
        "halfway_s42",
    ]
    config, evaluation = plan.runs[1]
    usual = replace(preset_defaults("smoke"), out_root=tmp_path / "out", seed=41)
    assert config == replace(usual, steps=4, label="halfway", arm="projected", basis=config.basis)
    assert type(config.overshoot) is float
    assert config.basis.parent == tmp_path / "out" / "smoke" / "bases"
    assert evaluation.samples == 2
    assert evaluation.modes == ("run_tests", "none")
    assert evaluation.adapter == config.run_dir / "adapter"
    assert evaluation.trained_on == "train"
    assert [config.seed for config, _ in read_sweep(sweep_file(), seeds=[7]).runs] == [7, 7]
    assert read_sweep(sweep_file(), out_root=tmp_path / "b").folder == tmp_path / "b" / "smoke"


def test_each_seed_may_have_a_model_of_its_own(sweep_file):
    plan = read_sweep(sweep_file(lambda text: text.replace("steps = 4", 'steps = 4\nmodel = "micro-{seed}"')))
    assert [config.model for config, _ in plan.runs] == ["micro-41", "micro-41", "micro-42", "micro-42"]
    assert [evaluation.model for _, evaluation in plan.runs] == [config.model for config, _ in plan.runs]
    assert len({config.basis for config, _ in plan.runs}) == 2


def test_an_arm_brings_its_settings_and_what_is_written_goes_before_them(sweep_file):
    held = read_sweep(sweep_file(lambda text: text.replace('arm = "vanilla"', 'arm = "held"'))).runs[0][0]
    assert (held.project_target, held.hold_rate, held.hold_cap) == ("displacement", 0.42, 28.0)
    other = 'arm = "held"\nhold_cap = 5'
    held = read_sweep(sweep_file(lambda text: text.replace('arm = "vanilla"', other))).runs[0][0]
    assert (held.hold_rate, held.hold_cap) == (0.42, 5.0)
    vanilla = read_sweep(sweep_file()).runs[0][0]
    assert (vanilla.project_target, vanilla.hold_rate) == ("grad", 0.0)


def test_a_basis_is_named_by_what_decides_it_and_by_nothing_else(sweep_file):
    def bases(setting):
        plan = read_sweep(sweep_file(lambda text: text.replace("overshoot = 1", setting)))
        return len({config.basis for config, _ in plan.runs})

    for setting in ("gate = 'reverse'", "steps = 7"):
        assert bases(setting) == 1, setting
    for setting in ("v_hack_k = 3", "n_pairs = 8", "temperature = 1"):
        assert bases(setting) == 2, setting


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('preset = "smoke"', 'preset = "smok"', ["sweep.toml: preset 'smok' is unknown", "smoke-real"]),
        ('preset = "smoke"', "", ["sweep.toml: no preset"]),
        ('preset = "smoke"', "preset = 3", ["preset must be text"]),
        ("seeds = [41, 42]", "", ["sweep.toml: seeds must be", "--seeds"]),
        ("seeds = [41, 42]", "seeds = []", ["seeds must be"]),
        ("seeds = [41, 42]", "seeds = [41, true]", ["seeds must be"]),
        ("seeds = [41, 42]", "seeds = [41, 41]", ["seeds 41, 41 name one twice"]),
        ("seeds = [41, 42]", "seeds = [-1]", ["[[run]] 1", "--seed -1"]),
        ("seeds = [41, 42]", "seads = [41]", ["unknown key 'seads'", "seeds"]),
        ("steps = 4", "stepz = 4", ["[common]", "unknown key 'stepz'"]),
        ("steps = 4", 'steps = "4"', ["[common]", "steps '4'", "a whole number"]),
        ("steps = 4", "steps = 0", ["[[run]] 1", "--steps 0 must be at least 1"]),
        ("steps = 4", "steps = ", ["sweep.toml", "no TOML", "line 6"]),
        ("steps = 4", 'modes = "run_tests"', ["modes 'run_tests'", "a list, each one of run_tests"]),
        ("steps = 4", 'problems = "none.toml"', ["[[run]] 1", "none.toml"]),
        ("steps = 4", "seed = 4", ["[common]", "seed has no place here", "seeds"]),
        ('arm = "vanilla"', 'arm = "vanila"', ["[[run]] 1", "arm 'vanila'", "one of vanilla, projected"]),
        ('arm = "vanilla"', 'arm = "projected"\nlabel = "halfway"', ["[[run]] 2 (halfway)", "second run", "label"]),
        ('label = "halfway"', 'label = "half/way"', ["[[run]] 2", "--label 'half/way'"]),
        ('label = "halfway"', 'label = "x"\npairs_without = ["nil"]', ["[[run]] 2 (x)", "no axis 'nil'"]),
        ('label = "halfway"', "overwrite = true", ["[[run]] 2", "overwrite has no place here"]),
        (
            'label = "halfway"',
            'label = "x"\nproblems = "micro-train"',
            ["share teacher_pool", "problems"],
        ),
        ("samples = 2", "samplez = 2", ["[eval]", "unknown key 'samplez'"]),
        ("samples = 2", "samples = 0", ["[eval]", "--samples 0"]),
        ("samples = 2", 'out = "x"', ["[eval]", "out has no place here"]),
        ("samples = 2", 'problems = "none.toml"', ["[eval]", "none.toml"]),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_entry(sweep_file, capsys, tmp_path, old, new, words):
    path = sweep_file(lambda text: text.replace(old, new))
    assert main(["sweep", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    for word in words:
        assert word in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["sweep.toml"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["FILE", "--preset"]),
        (["none.toml"], ["none.toml", "cannot be read"]),
        (["none.toml", "--arms", "vanilla"], ["--arms goes with --preset"]),
        (["--preset", "smoke", "--seeds", "41"], ["--arms names no arm"]),
        (["--preset", "smoke", "--arms", "vanilla"], ["--seeds names no seed"]),
        (["--preset", "smoke", "--arms", "vanilla,foo", "--seeds", "41"], ["arm 'foo'", "projected"]),
        (["--preset", "smoke", "--arms", "vanilla,vanilla", "--seeds", "41"], ["second run called 'vanilla'"]),
        (["--preset", "smoke", "--arms", "vanilla", "--seeds", "4x"], ["--seeds '4x'"]),
        (["--preset", "tiny", "--arms", "vanilla", "--seeds", "4"], ["preset 'tiny' is unknown"]),
        (["--preset", "smoke", "--arms", "vanilla", "--seeds", "4", "--problems", "no.toml"], ["no.toml"]),
        (["--preset", "smoke", "--arms", "vanilla", "--seeds", "4", "--jobs", "0"], ["--jobs 0"]),
    ],
)
def test_a_bad_argument_is_refused_in_one_line(capsys, args, words):
    assert main(["sweep", *args]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    for word in words:
        assert word in error


def test_a_dry_run_says_what_departs_and_leaves_nothing_behind(capsys, tmp_path):
    args = ["--out-root", str(tmp_path / "out"), "--problems", "eval", "--teacher-pool", "p.jsonl", "--dry-run"]
    for given in (
        ["--arms", "vanilla,projected", "--seeds", "41,42"],
        ["--arms", "vanilla", "projected", "--seeds", "41", "42"],
    ):
        assert main(["sweep", "--preset", "smoke", *given, *args]) == 0
        head, *lines = capsys.readouterr().out.splitlines()
        assert head.startswith("4 runs of preset smoke")
        assert [line.split()[:3] for line in lines] == [
            [arm, seed, "start"] for seed in ("s41", "s42") for arm in ("vanilla", "projected")
        ]
        assert all(line.split()[3:] == ["problems=eval", "teacher_pool=p.jsonl"] for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_loads_nothing_heavy(tmp_path):
    code = (
        "import sys\nfrom projected_grpo.cli import main\n"
        f"main(['sweep', {str(SWEEPS / 'leave_one_mode_out.toml')!r}, '--dry-run', '--out-root', {str(tmp_path)!r}])\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'peft', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- how far a run came ---


def test_the_state_of_a_run_is_read_off_its_folder(tmp_path):
    config, evaluation = plan_of(tmp_path).runs[0]
    folder = config.run_dir
    assert state_of(config, evaluation) == "start"
    folder.mkdir(parents=True)
    assert state_of(config, evaluation) == "start"
    (folder / "config.json.tmp").write_text("{")  # killed as it began
    assert state_of(config, evaluation) == "start"
    (folder / "config.json").write_text(replace(config, grader_workers=9).to_json())
    assert state_of(config, evaluation) == "start"
    torn, whole, end = (folder / "checkpoints" / f"checkpoint-{step}" for step in (5, 3, config.steps))
    torn.mkdir(parents=True)
    assert state_of(config, evaluation) == "start"
    for checkpoint in (end, whole):  # from its end a trainer would do one step more
        checkpoint.mkdir()
        (checkpoint / "optimizer.pt").write_text("x")
        seal(checkpoint)
        assert state_of(config, evaluation) == ("resume" if checkpoint == whole else "start")
    (whole / "optimizer.pt").write_text("y")
    with pytest.raises(InputError, match=r"holds 2 checkpoints and none is whole.*--overwrite"):
        state_of(config, evaluation)
    (whole / "optimizer.pt").write_text("x")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    assert state_of(config, evaluation) == "resume"
    (folder / LAST_FILE).write_text("")
    assert state_of(config, evaluation) == "evaluate"
    finish(config, evaluation)
    assert state_of(config, evaluation) == "done"


def test_another_run_in_the_folder_is_refused_before_anything_starts(tmp_path, capsys):
    plan = plan_of(tmp_path)
    config, evaluation = plan.runs[3]
    finish(replace(config, steps=9), evaluation)
    before = sorted(tmp_path.rglob("*"))
    args = ["--preset", "smoke", "--arms", "vanilla,projected", "--seeds", "41,42", "--out-root", str(tmp_path / "out")]
    assert main(["sweep", *args]) == 2
    error = capsys.readouterr().err
    assert str(config.run_dir) in error
    assert "another steps (9, wanted is 6)" in error
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_run_in_use_or_evaluated_otherwise_is_refused(tmp_path):
    config, evaluation = plan_of(tmp_path).runs[0]
    finish(config, evaluation)
    with pytest.raises(InputError, match=r"eval\.json was made with another samples \(8, wanted is 3\); delete it"):
        state_of(config, replace(evaluation, samples=3))
    (config.run_dir / "eval.json").write_text("[]")
    with pytest.raises(InputError, match=r"eval\.json is no evaluation"):
        state_of(config, evaluation)
    with locked(config.run_dir), pytest.raises(InputError, match="in use"):
        state_of(config, evaluation)
    (config.run_dir / "config.json").unlink()
    with pytest.raises(InputError, match="holds no run"):
        state_of(config, evaluation)


# --- the processes ---


def test_every_run_has_a_process_and_a_log_of_its_own_and_a_second_sweep_skips_them_all(tmp_path, capfd):
    plan = plan_of(tmp_path)
    go(plan, good)
    pids = [tries_of(run)[0][0] for run in plan.runs]
    assert len(set(pids)) == 4
    assert str(os.getpid()) not in pids
    text = log_of(plan.runs[0]).read_text()
    assert "said by vanilla s41" in text
    assert "said by a child" in text
    err = capfd.readouterr().err
    assert "[4/4]" in err
    assert "hack 0.12 pass 0.75 (held-out run_tests)" in err
    rows = [line.split() for line in err.splitlines() if re.match(r"(vanilla|projected) s4\d +done ", line)]
    assert [row[:7] for row in rows] == [
        [config.arm, f"s{config.seed}", "done", "6/6", "0.25", "0.50", "0.12"] for config, _ in plan.runs
    ]
    assert f"next: projected-grpo report {tmp_path}/out/smoke" in err
    go(plan, bad, preparation=refusing)
    err = capfd.readouterr().err
    assert "4 of 4 runs are done already" in err
    assert err.count(" skipped ") == 4


def test_no_more_runs_at_once_than_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plan = plan_of(tmp_path)
    go(plan, slow, jobs=2)
    tried = [tries_of(run) for run in plan.runs]
    spans = [[float(time) for _, time, *_ in run] for run in tried]
    at_once = [sum(start <= begin < end for start, end in spans) for begin, _ in spans]
    assert max(at_once) == 2
    assert "None" not in {value for run in tried for _, _, *found in run for value in found}
    assert "OMP_NUM_THREADS" not in os.environ


def test_the_processes_have_an_environment_of_their_own_and_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "7")
    names = ("OMP_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    with environment_of(3):
        inside = [os.environ.get(name) for name in names]
    assert inside == ["3", str(32 << 20), "7"]
    assert [os.environ.get(name) for name in names] == [None, None, "7"]


def test_a_killed_run_is_tried_again_and_the_others_do_not_notice(tmp_path, capfd):
    plan = plan_of(tmp_path)
    go(plan, killed_once)
    assert [len(tries_of(run)) for run in plan.runs] == [1, 2, 1, 1]
    err = capfd.readouterr().err
    assert "projected s41: killed by SIGKILL; trying once more" in err
    assert "[4/4]" in err


def test_a_run_that_fails_twice_is_reported_and_the_others_are_done(tmp_path, capfd):
    plan = plan_of(tmp_path)
    with pytest.raises(RunFault, match=r"1 of 4 runs failed: vanilla s41; .*ValueError: the sky.*vanilla_s41\.log"):
        go(plan, bad)
    assert [len(tries_of(run)) for run in plan.runs] == [2, 1, 1, 1]
    assert log_of(plan.runs[0]).read_text().count("ValueError: the sky") == 2
    assert [state_of(*run) for run in plan.runs] == ["start", "done", "done", "done"]
    assert re.search(r"vanilla s41 +failed +0/6 +- +- ", capfd.readouterr().err)


def test_what_the_preparation_refuses_starts_nothing(tmp_path):
    plan = plan_of(tmp_path)
    with pytest.raises(InputError, match=r"^pool x was graded by another version; build it anew$"):
        go(plan, good, preparation=refusing)
    with pytest.raises(RunFault, match=r"no run was started: AttributeError.*preparation\.log"):
        go(plan, good, preparation=bad)
    assert [state_of(*run) for run in plan.runs] == ["start"] * 4


@pytest.mark.parametrize("job", [interrupted, terminated, stubborn])
def test_ctrl_c_starts_no_more_runs_and_says_how_to_go_on(tmp_path, capfd, job):
    plan = plan_of(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pid").write_text(str(os.getpid()))
    began = time.monotonic()
    with pytest.raises(RunInterrupted, match=r"^interrupted with 0 of 4 runs done; go on with `the same`$"):
        go(plan, job, jobs=1, again="`the same`")
    assert time.monotonic() - began < 20  # a second Ctrl-C ends even what does not listen
    err = capfd.readouterr().err
    assert err.count(" not started ") == 3
    assert "interrupted: finishing a step" in err or "interrupted: ending" in err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    (tmp_path / "out" / "pid").unlink()
    go(plan, good)
    assert [state_of(*run) for run in plan.runs] == ["done"] * 4


def test_a_ctrl_c_before_the_first_process_starts_none(tmp_path):
    interrupts = Interrupts()
    interrupts.count = 1
    assert run_all(["a task"], LocalLauncher(good, process_context(True, [])), interrupts) == {}


def test_the_last_rows_of_a_file_that_is_being_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_rows(path) == []
    path.write_text('{"step": 1}\n{"st')
    assert last_rows(path) == [{"step": 1}]
    path.write_text("".join(json.dumps({"step": n, "x": "y" * 1000}) + "\n" for n in range(100)) + '{"s')
    assert [row["step"] for row in last_rows(path)] == [95, 96, 97, 98, 99]


def test_the_status_of_a_sweep_is_read_off_its_folders_alone(tmp_path, capsys):
    plan = plan_of(tmp_path)
    (done, evaluation), (running, _), (trained, _), (stopped, _) = plan.runs
    for config in (done, running, trained, stopped):
        finish(config, replace(evaluation, out=config.run_dir / "eval.json"))
    for config in (running, trained, stopped):
        (config.run_dir / "eval.json").unlink()
    rows = [{"step": step, "hack_student": 0.5, "pass_student": 0.25, "time/step": 30.0} for step in (1, 2)]
    for config in (running, stopped):
        (config.run_dir / LAST_FILE).unlink()
        (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.utime(stopped.run_dir / "metrics.jsonl", (1, 1))
    args = ["--preset", "smoke", "--arms", "vanilla,projected", "--seeds", "41,42,43"]
    with locked(running.run_dir):
        assert main(["sweep", "status", *args, "--out-root", str(tmp_path / "out")]) == 0
    header, *lines, last = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["run", "state", "steps"]
    assert [line.split() for line in lines[:4]] == [
        ["vanilla_s41", "done", "6/6", "-", "-", "0.25", "0.50", "0.12", "0.75"],
        ["projected_s41", "running", "2/6", "30.0", "2", "min", "0.50", "0.25", "-", "-"],
        ["vanilla_s42", "trained", "6/6", "-", "-", "0.25", "0.50", "-", "-"],
        ["projected_s42", "stopped", "2/6", "30.0", "-", "0.50", "0.25", "-", "-"],
    ]
    assert [line.split()[1:3] for line in lines[4:]] == [["not", "started"]] * 2
    assert last == "1 of 6 runs done"


# --- the real thing ---


def process_that_writes(log):
    """The sweep's own child whose standard error is `log`."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "fd" / "2").resolve() == log and b"forkserver" in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except OSError:
            continue
    return None


@pytest.mark.slow
def test_two_arms_and_two_seeds_with_one_run_killed_midway(tmp_path):
    from projected_grpo.projection import BASIS_FILE

    assert LAST_FILE == BASIS_FILE
    out = tmp_path / "out"
    path = tmp_path / "sweep.toml"
    path.write_text(
        f"""
preset = "smoke"
seeds = [41, 42]
out_root = "{out}"
[common]
steps = 6
save_every = 2
n_pairs = 6
v_hack_k = 2
max_completion_length = 96
teacher_pool = "{tmp_path}/pool.jsonl"
[[run]]
arm = "vanilla"
[[run]]
label = "update"
arm = "projected"
project_target = "update"
[eval]
samples = 1
limit = 3
modes = ["run_tests"]
"""
    )
    victim = out / "smoke" / "update_s41"
    killed = []

    def kill():
        while not killed:
            rows = last_rows(victim / "metrics.jsonl")
            if (
                rows
                and rows[-1]["step"] >= 3
                and (pid := process_that_writes(out / "smoke" / "logs" / "update_s41.log"))
            ):
                os.kill(pid, signal.SIGKILL)
                killed.append(rows[-1]["step"])
            time.sleep(0.05)

    threading.Thread(target=kill, daemon=True).start()
    command = [sys.executable, "-m", "projected_grpo", "sweep", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert killed
    assert "update s41: killed by SIGKILL; trying once more" in done.stderr
    assert "[4/4]" in done.stderr
    for name in ("vanilla_s41", "update_s41", "vanilla_s42", "update_s42"):
        rows = [json.loads(line) for line in (out / "smoke" / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert len(json.loads((out / "smoke" / name / "eval.json").read_text())["samples"]) == 3
    assert len(list((out / "smoke" / "bases").iterdir())) == 1
    assert "dropped 1 rows of steps after 2" in (victim / "train.log").read_text()  # it was resumed, not begun anew
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0
    assert "4 of 4 runs are done already" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
