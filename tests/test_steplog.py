"""The step log: alignment, JSON lines, resume, legend, verdict, and lines that do not tear the bar."""

import json
import math
import os
import pty
import subprocess
import sys
import termios
from itertools import pairwise, product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loguru import logger

from projected_grpo import steplog
from projected_grpo.errors import InputError
from projected_grpo.step_columns import COLUMNS, RunKind, format_row, header, legend
from projected_grpo.steplog import StepLog, read_metrics

PROJECTED = ("projected", "one_sided", "grad")
numbers = (
    st.none()
    | st.floats(-1e300, 1e300)
    | st.sampled_from([math.nan, math.inf, -math.inf])
    | st.integers(-(10**30), 10**30)
)


def metrics(step, **values):
    """A row with every column; unlike numbers, so that no two keys can be mixed up unseen."""
    return {"step": step, **{c.key: step + n / 64 for n, c in enumerate(COLUMNS) if c.key != "step"}, **values}


def values_of(column):
    return st.integers(0, 10**12) if column.format == "d" else numbers


@settings(deadline=None)  # two busy cores
@given(st.fixed_dictionaries({column.key: values_of(column) for column in COLUMNS}))
@example({column.key: -1e-308 if column.key != "step" else 10**6 for column in COLUMNS})
@example({column.key: -123456.789 if column.key != "step" else 0 for column in COLUMNS})
def test_every_row_is_aligned_with_the_header(row):
    line, head = format_row(row), header()
    assert len(line) == len(head) <= 180  # and 20 for the date and time in train.log
    end = -1
    for column in COLUMNS:
        start, end = end + 1, end + 1 + column.width
        cell = line[start:end]
        assert head[start:end] == column.header.rjust(column.width)
        assert cell == cell.strip().rjust(column.width)
        assert line[end : end + 1] in (" ", "")
        value = row[column.key]
        if value is None:
            assert cell.strip() == "-"
        elif set(cell.strip()) == {"#"}:
            assert abs(value) > 1e30 or abs(value) < 1e-30
        elif math.isfinite(value):
            shown = float(cell)
            assert (shown == 0) == (value == 0)
            assert math.isclose(shown, value, rel_tol=0.5)
            assert shown * value >= 0
        else:
            assert cell.strip() == str(value)


def test_cells():
    rate = next(column for column in COLUMNS if column.key == "hack_student")
    shown = {0.5: "0.50", 0: "0.00", 1e-5: "1e-05", -0.25: "-0.25", 12345.6: "12346", None: "-", math.nan: "nan"}
    assert {value: rate.cell(value).strip() for value in shown} == shown


def test_missing_keys_are_dashes():
    assert format_row({"step": 3}).split() == ["3"] + ["-"] * (len(COLUMNS) - 1)


@pytest.mark.parametrize("arm", ["vanilla", "projected", "random", "random_matched", "placebo_style", "flipped"])
def test_legend_explains_every_column(arm):
    for gate, target in product(("one_sided", "no_gate", "reverse"), ("grad", "update", "both")):
        lines = legend(RunKind(arm, gate, target))
        assert max(map(len, lines)) <= 180
        entries = [line[:9].strip() for line in lines[1:] if line[:9].strip()]
        assert entries == header().split()


def entry(name, *run):
    lines = "\n".join(legend(RunKind(*run), width=10_000)).splitlines()
    return next(line for line in lines if line[:9].strip() == name)


def test_legend_says_what_this_run_should_show():
    assert "cin_t > cin_s throughout" in entry("cin_t", *PROJECTED)
    assert "cout = cin" in entry("cout", "vanilla", "one_sided", "grad")
    assert "cout = cin" in entry("cout", "projected", "one_sided", "update")
    for gate, target in product(("one_sided", "no_gate"), ("grad", "both")):
        assert "near 0" in entry("cout", "projected", gate, target)
    assert "near 0" in entry("cup_out", "projected", "one_sided", "both")
    assert "cup_out = cup" in entry("cup_out", *PROJECTED)
    assert "cup_out = cup" in entry("cup_out", "vanilla", "one_sided", "both")
    assert "above its null" in entry("cin", *PROJECTED)
    assert "beside its null" in entry("cin", "random", "one_sided", "grad")


def test_rows_are_written_and_read_back(tmp_path, capsys):
    rows = [metrics(1, extra={"a": [1, 2.5]}, label="x"), metrics(2, cin=None, z=0.1 + 0.2)]
    with StepLog(tmp_path, *PROJECTED, total_steps=2) as log:
        for row in rows:
            log.row(row)
    assert read_metrics(tmp_path / "metrics.jsonl") == rows
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [list(json.loads(line)) for line in lines] == [list(row) for row in rows]
    printed = capsys.readouterr().err
    assert format_row(rows[0]) in printed
    assert "\r" not in printed
    assert "\x1b" not in printed
    saved = (tmp_path / "train.log").read_text()
    assert [line[9:] for line in printed.splitlines()] == [line[20:] for line in saved.splitlines()]
    assert max(map(len, saved.splitlines())) <= 200


def test_numbers_that_are_not_finite_become_null_with_one_warning_a_key(tmp_path, capsys):
    with StepLog(tmp_path, *PROJECTED, total_steps=3) as log:
        log.row(metrics(1, loss=math.nan, nested={"deep": [math.inf, 1.0]}))
        log.row(metrics(2, loss=-math.inf))
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["loss"], first["nested"], second["loss"]) == (None, {"deep": [None, 1.0]}, None)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert [("'loss'" in line, "'nested.deep'" in line) for line in warnings] == [(True, False), (False, True)]


def test_what_is_no_metric_is_refused_before_anything_is_written(tmp_path):
    with StepLog(tmp_path, *PROJECTED, total_steps=1) as log, pytest.raises(TypeError):
        log.row({"step": 1, "loss": object()})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_header_comes_back_with_the_time_left(tmp_path, capsys):
    with StepLog(tmp_path, *PROJECTED, total_steps=7200, header_every=20) as log:
        log._started -= 20 * 60.0
        for step in range(1, 42):
            log.row(metrics(step))
    lines = [line[9:] for line in capsys.readouterr().err.splitlines()]
    at = [n for n, line in enumerate(lines) if line == header()]
    assert [b - a for a, b in pairwise(at)] == [22, 22]
    assert lines[at[1] - 1] == "projected: step 21 of 7200, 57.1 s a step, about 113 h 57 min left"


def run_steps(folder, steps, start=0):
    with StepLog(folder, *PROJECTED, total_steps=10, start_step=start) as log:
        for step in steps:
            log.row(metrics(step, attempt=start))


@pytest.mark.parametrize("tail", ["", '{"step": 8, "lo', '{"step": 8'])
def test_resume_neither_loses_nor_doubles_a_row(tmp_path, tail):
    run_steps(tmp_path, range(1, 8))
    path = tmp_path / "metrics.jsonl"
    kept = path.read_text().splitlines(keepends=True)[:4]
    with path.open("a") as file:
        file.write(tail)
    run_steps(tmp_path, range(5, 11), start=4)
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["attempt"] for row in rows] == [0] * 4 + [4] * 6
    assert "".join(kept) == "".join(path.read_text().splitlines(keepends=True)[:4])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "train.log"]
    log = (tmp_path / "train.log").read_text()
    assert f"dropped {4 if tail else 3} rows of steps after 4" in log
    assert log.count("columns of this run") == 2


def test_resume_warns_of_rows_that_are_not_there(tmp_path, capsys):
    run_steps(tmp_path, range(1, 3))
    run_steps(tmp_path, [5], start=4)
    assert "2 rows for the 4 steps already done" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[1]", '"step"'),
        ('{"loss": 1}', '"step"'),
        ('{"step": 2.0}', '"step"'),
        ('{"step": true}', '"step"'),
        ('{"step": 1}', "steps must increase"),
        ('{"step": 2, "loss": NaN}', "null"),
        ("\x00\ufffd", "not JSON"),
    ],
)
def test_damaged_metrics_are_refused_with_file_and_line(tmp_path, line, what):
    path = tmp_path / "metrics.jsonl"
    text = f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'
    path.write_text(text)
    with pytest.raises(InputError) as info:
        read_metrics(path)
    assert f"{path}:2: " in str(info.value)
    assert what in str(info.value)
    assert "\n" not in str(info.value)
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: "):
        StepLog(tmp_path, *PROJECTED, total_steps=3, start_step=1).__enter__()
    assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_missing_and_empty_metrics(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_verdict_by_hand(tmp_path, capsys):
    def row(step):
        return {
            "step": step,
            "hack_student": step / 10,
            "pass_student": 1 - step / 10,
            "cin": None if step == 8 else 0.3,
            "cin_null": 0.1,
            "cout": 0.0,
            "time/generation": step * 1.0,
            "time/grading": 0.5,
            "time/update": 0.25,
            "time/step": step + 1.0,
        }

    with StepLog(tmp_path, *PROJECTED, total_steps=8) as log:
        for step in range(1, 7):
            log.row(row(step))
    with StepLog(tmp_path, *PROJECTED, total_steps=8, start_step=6) as log:
        for step in (7, 8):
            log.row(row(step))
        text = log.verdict({"metrics": tmp_path / "metrics.jsonl", "adapter": tmp_path}, "projected-grpo eval x")
    assert text.splitlines() == [
        "verdict: projected, one_sided, target grad: 8 of 8 steps",
        "  student  hack 0.30 -> 0.60   pass 0.70 -> 0.40",  # steps 1 to 5 -> steps 4 to 8
        "           (means of the first 5 -> the last 5 steps)",
        "  gradient cin 0.300 beside its null 0.100 (3.0 times), cout 0.000 (means of all steps)",
        "  seconds  5.50 a step: generation 4.50, grading 0.50, update 0.25",
        f"  files    metrics  {tmp_path / 'metrics.jsonl'}",
        f"           adapter  {tmp_path}",
        "  next     projected-grpo eval x",
    ]
    printed = "\n".join(line[9:] for line in capsys.readouterr().err.splitlines())
    assert printed.endswith(text)
    assert text.splitlines()[1] in (tmp_path / "train.log").read_text()


def test_verdict_with_a_teacher_and_without_numbers(tmp_path):
    with StepLog(tmp_path, *PROJECTED, total_steps=3) as log:
        empty = log.verdict({}, "n")
        log.row({"step": 1, "hack_student": 0.5, "pass_student": 0.25, "hack_teacher": 1.0, "pass_teacher": 0.0})
        text = log.verdict({}, "n")
    assert "0 of 3 steps" in empty
    assert "  teacher  hack 1.00 -> 1.00   pass 0.00 -> 0.00" in text
    assert "cin - beside its null -, cout -" in text


def test_handlers_are_taken_off_again(tmp_path):
    steplog.setup_console()
    before = set(logger._core.handlers)
    with pytest.raises(ZeroDivisionError), StepLog(tmp_path, *PROJECTED, total_steps=1):
        raise ZeroDivisionError
    assert set(logger._core.handlers) == before


def test_module_does_not_need_torch():
    code = "import sys, projected_grpo.steplog; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def screen(raw):
    """The lines that a terminal shows after `raw`: what follows a carriage return overwrites."""
    shown = []
    for line in raw.split("\n"):
        cells = ""
        for part in line.split("\r"):
            cells = part + cells[len(part) :]
        shown.append(cells.rstrip())
    return shown


def test_lines_never_tear_the_bar_on_a_terminal(tmp_path):
    script = """
import sys
from pathlib import Path
from loguru import logger
from projected_grpo.steplog import StepLog
with StepLog(Path(sys.argv[1]), "projected", "one_sided", "grad", total_steps=5) as log:
    for step in range(1, 6):
        log.row({"step": step, "loss": 0.5})
        logger.info("a line from elsewhere")
"""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, 200))
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=theirs, stdout=theirs)
    os.close(theirs)
    raw = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux says so at the end of a pseudo-terminal
            break
        if not chunk:
            break
        raw += chunk
    os.close(ours)
    assert process.wait() == 0
    assert "5/5" in raw.decode()
    lines = screen(raw.decode())
    logged = [line for line in lines if "|" not in line and line]
    saved = [line[20:] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert [line[9:] for line in logged] == saved
    [bar] = [line for line in lines if "|" in line]
    assert "100%" in bar
