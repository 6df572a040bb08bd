"""Offline grading: what is refused leaves every file as it was, and an interrupted result goes on."""

import json

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
    """Grade, but fail after `rows` rows, one row a batch."""
    whole = offline._grade_rows
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) > rows:
            raise RunFault("interrupted")
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(offline, "BATCH", 1)
        patch.setattr(offline, "_grade_rows", failing)
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
        Grader, "grade", lambda self, requests, grade=Grader.grade: graded.extend(requests) or grade(self, requests)
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
    with files[1].open("a") as file:
        file.write(json.dumps({"id": "p-1", "completion": "x"}) + "\n")
    with pytest.raises(InputError, match=r"o\.jsonl: exists; use --overwrite"):
        grade_file(*files, workers=1)
    assert files[2].read_bytes() == whole
    assert grade_file(*files, workers=1, overwrite=True).total() == 9


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
