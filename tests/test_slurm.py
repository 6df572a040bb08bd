"""`sweep --launcher slurm`, over stand-ins for Slurm's own commands that run each job as a process of this machine.

`scripts/slurm_loopback.sh` starts a real Slurm; RESEARCH_JOURNAL.md says what was tried on it.
"""

import os
import signal
import stat
import sys
import time

import pytest
from test_sweep import bad, finish, good, killed_once, log_of, nothing, plan_of, refusing, tries, tries_of

from projected_grpo.cli import main
from projected_grpo.errors import InputError, RunFault, RunInterrupted
from projected_grpo.run_state import state_of
from projected_grpo.steplog import setup_console
from projected_grpo.sweep import sweep

COMMANDS = {
    "sbatch": """
import itertools
number = next(n for n in itertools.count(1) if not (jobs / str(n)).exists())
lines = open(sys.argv[1]).read()
environment = os.environ | {"SLURM_JOB_ID": str(number)}
process = subprocess.Popen(["bash", sys.argv[1]], env=environment, start_new_session=True, stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
(jobs / str(number)).write_text(str(process.pid))
(jobs / f"{number}.sbatch").write_text(lines)
print(f"Submitted batch job {number}")
""",
    "srun": """
command = sys.argv[1:]
while command[0].startswith("--"):
    command = command[2:] if command[0] in ("--output", "--error") else command[1:]
os.execvp(command[0], command)
""",
    "squeue": """
for path in jobs.glob("[0-9]*"):
    if path.suffix == "":
        try:
            state = open(f"/proc/{path.read_text()}/stat").read().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            print(path.name)
""",
    "scontrol": """
number = sys.argv[-1]
environment = os.environ | {"SLURM_JOB_ID": number}
process = subprocess.Popen(["bash", str(jobs / f"{number}.sbatch")], env=environment, start_new_session=True,
    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
(jobs / number).write_text(str(process.pid))
""",
    "scancel": """
import signal
if "--state=PENDING" in sys.argv:
    sys.exit()
number = signal.SIGTERM if "--signal=TERM" in sys.argv else signal.SIGKILL
try:
    os.killpg(int((jobs / sys.argv[-1]).read_text()), number)
except ProcessLookupError:
    pass
""",
}


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """The folder in which the stand-ins note each job: its process, and its sbatch file."""
    setup_console()
    binaries, noted = tmp_path / "bin", tmp_path / "jobs"
    binaries.mkdir()
    noted.mkdir()
    for name, code in COMMANDS.items():
        path = binaries / name
        head = (
            f"#!{sys.executable}\nimport os, subprocess, sys\nfrom pathlib import Path\njobs = Path({str(noted)!r})\n"
        )
        path.write_text(head + code)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))  # where the jobs of these tests are defined
    monkeypatch.setattr("projected_grpo.sweep_slurm.ASK_EVERY_S", 0.5)
    monkeypatch.setattr("projected_grpo.sweep_slurm.GRACE_S", 1.0)
    return noted


def go(plan, job, preparation=nothing, **kwargs):
    sweep(plan, job=job, preparation=preparation, slurm={"partition": "debug", "time": 30}, **kwargs)


def test_every_run_is_a_job_with_the_sweeps_log_and_a_second_sweep_submits_none(tmp_path, jobs, capfd):
    plan = plan_of(tmp_path)
    go(plan, good)
    assert [state_of(*run) for run in plan.runs] == ["done"] * 4
    assert "said by vanilla s41" in log_of(plan.runs[0]).read_text()
    text = (jobs / "2.sbatch").read_text()
    assert "#SBATCH --partition=debug" in text
    assert "#SBATCH --time=30" in text
    assert "#SBATCH --job-name=vanilla_s41" in text
    assert "[4/4]" in capfd.readouterr().err
    before = len(list(jobs.iterdir()))
    go(plan, bad, preparation=refusing)
    assert len(list(jobs.iterdir())) == before


@pytest.mark.slow
def test_a_job_that_is_killed_is_submitted_again_and_the_others_do_not_notice(tmp_path, jobs, capfd):
    plan = plan_of(tmp_path)
    go(plan, killed_once, jobs=2)
    assert [len(tries_of(run)) for run in plan.runs] == [1, 2, 1, 1]
    assert "was ended from outside" in capfd.readouterr().err
    assert [state_of(*run) for run in plan.runs] == ["done"] * 4


@pytest.mark.slow
def test_a_job_that_fails_twice_or_a_preparation_that_refuses_is_reported(tmp_path, jobs):
    plan = plan_of(tmp_path)
    with pytest.raises(RunFault, match=r"1 of 4 runs failed: vanilla s41; .*ValueError: the sky.*vanilla_s41\.log"):
        go(plan, bad)
    assert [state_of(*run) for run in plan.runs] == ["start", "done", "done", "done"]
    with pytest.raises(InputError, match=r"^pool x was graded by another version; build it anew$"):
        go(plan, good, preparation=refusing)


def out_of_time(task):
    """Slurm says so once, in the middle of a run."""
    if tries(task) == 1:
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(60)
    finish(task.config, task.evaluation)


def test_a_job_that_is_out_of_time_goes_back_into_the_queue_and_is_no_failure(tmp_path, jobs, capfd):
    plan = plan_of(tmp_path, seeds=(41,))
    go(plan, out_of_time)
    assert [len(tries_of(run)) for run in plan.runs] == [2, 2]
    assert [state_of(*run) for run in plan.runs] == ["done"] * 2
    assert "trying once more" not in capfd.readouterr().err
    assert len(list(jobs.glob("*.sbatch"))) == 3  # one that prepared, and one a run


def until_sigterm(task):
    """It has no handler of its own, as a run that is still starting."""
    os.kill(int((task.config.out_root / "pid").read_text()), signal.SIGINT)
    time.sleep(60)


@pytest.mark.slow
def test_ctrl_c_asks_every_job_to_stop(tmp_path, jobs, capfd):
    plan = plan_of(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pid").write_text(str(os.getpid()))
    with pytest.raises(RunInterrupted, match=r"^interrupted with 0 of 4 runs done; go on with `the same`$"):
        go(plan, until_sigterm, jobs=1, again="`the same`")
    assert "vanilla s41: interrupted" in capfd.readouterr().err
    go(plan, good, jobs=4)
    assert [state_of(*run) for run in plan.runs] == ["done"] * 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--slurm", "partition=x"], ["--slurm partition=x", "--launcher slurm"]),
        (["--launcher", "slurm", "--slurm", "partition"], ["--slurm 'partition' is not KEY=VALUE"]),
        (["--launcher", "slurm"], ["give each job's time in minutes"]),
        (["--launcher", "slurm", "--slurm", "time=5", "color=red"], ["--slurm: Unavailable parameter(s): ['color']"]),
    ],
)
def test_bad_settings_are_refused_in_one_line(tmp_path, jobs, capsys, flags, words):
    args = ["--preset", "smoke", "--arms", "vanilla", "--seeds", "41", "--out-root", str(tmp_path / "out")]
    assert main(["sweep", *args, *flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    for word in words:
        assert word in line


def test_a_machine_without_slurm_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match='--launcher slurm: Could not detect "srun"'):
        go(plan_of(tmp_path), good)
