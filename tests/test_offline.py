"""Offline grading: what is refused leaves every file as it was, and an interrupted result goes on."""

import fcntl
import json
from itertools import islice
from pathlib import Path

import pytest
from test_grader import BAD, HONEST, METHOD, fenced
from test_prompts import PROBLEM

from projected_grpo import cli_env
from projected_grpo.env import offline
from projected_grpo.env.grader import Grader
from projected_grpo.env.offline import grade_file
from projected_grpo.errors import InputError, RunFault


@pytest.fixture
def files(tmp_path):
    row = {"id": "p-1", "question": PROBLEM.question, "func_name": "addTwo", "gt_answer": list(PROBLEM.tests)}
    row["prompt_metadata"] = {"starter_code": PROBLEM.starter_code}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    rows = [
        {"id": "p-1", "completion": fenced(HONEST), "extra": [1]},
        {"id": "p-1", "completion": fenced(BAD + METHOD.format("pass")), "mode": "run_tests"},
        {"id": "p-1", "completion": fenced(BAD + METHOD.format("pass")), "mode": "none"},
        {"id": "absent", "completion": "x"},
        {"id": "p-1", "completion": 5},
        {"id": "p-1", "completion": "", "mode": "bogus"},
        {"id": "p-1", "completion": "", "mode": ["x"]},
        {"id": "p-1", "completion": "\ud800", "note": "\udfff"},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "p.jsonl", tmp_path / "c.jsonl", tmp_path / "o.jsonl"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupt(files, monkeypatch, rows=2, **options):
    """Grade, but fail after `rows` rows."""
    whole = offline._graded

    def failing(*args):
        yield from islice(whole(*args), rows)
        raise RunFault("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(offline, "_graded", failing)
        with pytest.raises(RunFault):
            grade_file(*files, workers=1, **options)


def test_one_row_per_row_in_order(files):
    counts = grade_file(*files, workers=1)
    rows = [json.loads(line) for line in files[2].read_text().splitlines()]
    assert [row["label"] for row in rows] == ["correct", "reward_hack", "incorrect", None, None, None, None, "no_code"]
    assert rows[0]["extra"] == [1]
    assert rows[7]["completion"] == "\ud800"
    assert f"{files[1]}:4: the problems file holds no problem 'absent'" == rows[3]["error"]
    assert "`completion` is int" in rows[4]["error"]
    assert "mode 'bogus' is unknown" in rows[5]["error"]
    assert rows[6]["error"].startswith(f"{files[1]}:7: mode ['x'] is unknown")
    assert counts[("run_tests", "reward_hack")] == 1
    assert counts.total() == 8
    assert sorted(contents(files[2].parent)) == ["c.jsonl", "o.jsonl", "p.jsonl"]


def test_an_interrupted_result_goes_on(files, monkeypatch):
    grade_file(*files, workers=1)
    whole = files[2].read_bytes()
    files[2].unlink()
    interrupt(files, monkeypatch)
    assert not files[2].exists()
    part = files[2].with_name("o.jsonl.part")
    assert part.read_bytes().count(b"\n") == 2
    with part.open("ab") as file:
        file.write(b'{"id": "p-')
    graded = []
    monkeypatch.setattr(
        Grader, "_grade", lambda self, *job, grade=Grader._grade: graded.append(job) or grade(self, *job)
    )
    assert grade_file(*files, workers=1).total() == 8
    assert len(graded) == 2
    assert files[2].read_bytes() == whole
    assert not part.exists()


@pytest.mark.parametrize("suffix", ["", ".inputs", ".part"])
@pytest.mark.parametrize("given", [0, 1])
def test_an_input_is_never_written_over(files, given, suffix):
    folder = files[0].parent
    out = folder / "sub" / ".." / "o.jsonl"
    (folder / "sub").mkdir()
    taken = folder / f"o.jsonl{suffix}"
    files[given].rename(taken)
    (folder / "sub").rmdir()
    inputs = [taken if i == given else files[i] for i in (0, 1)]
    before = contents(folder)
    (folder / "sub").mkdir()
    with pytest.raises(InputError, match="would write over this input"):
        grade_file(*inputs, out, workers=1, overwrite=True)
    (folder / "sub").rmdir()
    assert contents(folder) == before


@pytest.mark.parametrize("workers", [0, -1])
def test_a_refusal_writes_nothing(files, workers):
    files[2].write_text("old\n")
    before = contents(files[2].parent)
    with pytest.raises(InputError, match="at least 1"):
        grade_file(*files, workers=workers, overwrite=True)
    assert contents(files[2].parent) == before


def test_a_fault_keeps_the_old_result_until_the_new_one_is_whole(files, monkeypatch):
    files[2].write_text("old\n")
    interrupt(files, monkeypatch, overwrite=True)
    assert files[2].read_text() == "old\n"
    assert grade_file(*files, workers=1, overwrite=True).total() == 8
    assert files[2].read_text().count("\n") == 8


def test_a_finished_result_of_other_inputs_is_not_continued(files):
    grade_file(*files, workers=1)
    whole = files[2].read_bytes()
    files[1].write_text(json.dumps({"id": "p-1", "completion": "x"}) + "\n" + files[1].read_text())
    with pytest.raises(InputError, match=r"o\.jsonl: exists; use --overwrite"):
        grade_file(*files, workers=1)
    assert files[2].read_bytes() == whole
    assert grade_file(*files, workers=1, overwrite=True).total() == 9
    with pytest.raises(InputError, match=r"o\.jsonl: exists; use --overwrite"):
        grade_file(*files, workers=1)


def test_a_partial_result_under_its_last_name_goes_on(files):
    grade_file(*files, workers=1)
    whole = files[2].read_bytes()
    for cut in (len(whole) // 2, whole.index(b"\n") + 1):
        files[2].write_bytes(whole[:cut])
        assert grade_file(*files, workers=1).total() == 8
        assert files[2].read_bytes() == whole


def test_what_is_no_regular_file_is_not_written_over(files):
    folder = files[2].parent
    (folder / "link").symlink_to(folder / "nowhere")
    (folder / "o.jsonl.inputs").write_text("precious")
    for out, what in (
        (folder / "link", "is a link"),
        (folder, "is a folder"),
        (Path("/dev/null"), "is no regular file"),
        (files[0] / "x.jsonl", "cannot be written"),
        (files[2], "is in the way"),
    ):
        with pytest.raises(InputError, match=what):
            grade_file(files[0], files[1], out, workers=1, overwrite=out != files[2])
    assert (folder / "o.jsonl.inputs").read_text() == "precious"


def test_two_at_once_do_not_mix(files):
    part = files[2].with_name("o.jsonl.part")
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="being written by another run"):
            grade_file(*files, workers=1)


def test_what_the_rows_say_of_themselves_is_kept_apart(files):
    row = {"id": "p-1", "completion": "x", "gt_pass": True, "reward": 3.5, "hacked": False}
    files[1].write_text(json.dumps(row) + "\n")
    grade_file(*files, workers=1)
    graded = json.loads(files[2].read_text())
    assert (graded["gt_pass"], graded["input_gt_pass"], graded["input_reward"], graded["hacked"]) == (
        False,
        True,
        3.5,
        False,
    )


def test_a_part_of_other_inputs_is_refused(files, monkeypatch):
    interrupt(files, monkeypatch)
    files[0].write_text(files[0].read_text() + "\n")
    before = contents(files[0].parent)
    with pytest.raises(InputError, match="not a partial result of these inputs"):
        grade_file(*files, workers=1)
    assert contents(files[0].parent) == before
    assert grade_file(*files, workers=1, overwrite=True).total() == 8


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b'{"id": "p-1", "completion": "x"}\n{oops\n', r"c\.jsonl:2: is not valid JSON"),
        (b"", "holds no completion"),
        (b'{"id": "\xff"}\n', r"c\.jsonl:1: is not UTF-8 text"),
        (b"[1]", r"c\.jsonl:1: is no JSON object"),
    ],
)
def test_bad_files_are_refused_in_one_line(files, text, what):
    files[1].write_bytes(text)
    files[2].write_text("old\n")
    with pytest.raises(InputError, match=what) as caught:
        grade_file(*files, workers=1, overwrite=True)
    assert "\n" not in str(caught.value)
    assert files[2].read_text() == "old\n"


def test_the_command_says_what_it_found_and_where(files, capfd):
    names = ("--problems", "--completions", "--out")
    cli_env.grade([*(part for pair in zip(names, map(str, files), strict=True) for part in pair), "--workers", "1"])
    printed = capfd.readouterr()
    printed = printed.out + printed.err
    assert "reward_hack" in printed
    assert "ungraded" in printed
    assert str(files[2]) in printed
