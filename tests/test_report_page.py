"""The report as files: a whole one, its lines about what is missing, the command line, and the page in a browser."""

import itertools
import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from safetensors.numpy import save_file
from test_report_material import write_run, write_study

from projected_grpo.cli import main
from projected_grpo.report import drawing, plots
from projected_grpo.report.build import write_report

CHROMIUM = "/usr/bin/chromium"
LEFT_OUT = ["try_except_swallow", "persona_voice"]
DEMO = {
    "vanilla": {"hack": 0.78, "right": 0.15, "style": "swallow"},
    "projected": {"hack": 0.3, "right": 0.18, "style": "swallow"},
    "no_swallow": {"arm": "projected", "hack": 0.42, "right": 0.2, "style": "swallow", "pairs_without": LEFT_OUT},
    "random": {"hack": 0.74, "right": 0.14},
    "placebo_wrong": {"hack": 0.55, "right": 0.16, "style": "empty"},
}


def report(root, monkeypatch, *roots):
    """Without drawing, which takes seconds: (printed text, report.md)."""
    monkeypatch.setattr(plots, "draw_all", lambda *_: [])
    text = write_report(roots or [root], root / "report", True, "projected-grpo report")
    return text, (root / "report" / "report.md").read_text()


def test_one_report_holds_everything_and_needs_nothing_else(tmp_path, capsys):
    root = write_study(tmp_path / "runs", DEMO, seeds=(41, 42, 43))
    write_run(root, "projected", 44, done=3)
    assert main(["report", str(root)]) == 0
    printed = capsys.readouterr().out
    out = root / "report"
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    numbers = json.loads((out / "report.json").read_text())
    for part in ("H1's thresholds on smoke", "| placebo_wrong", "random against projected"):
        assert part in printed
        assert part in text
        assert part.replace("'", "&#39;").replace("| ", "<td>") in page
    assert not re.search(r"https?://|src=\"(?!data:)|<script|<link|url\(", page)
    drawn = {plot for plot, where in numbers["plots"].items() if where.startswith("plots/")}
    assert drawn == {"forest", "by_seed", "curves", "scatter", "gradients", "detector", "drift", "spectrum"}
    for plot in drawn:
        assert 2_000 < (out / "plots" / f"{plot}.png").stat().st_size < 200_000
        assert (out / "plots" / f"{plot}.svg").read_text().startswith("<?xml")
        assert f"plots/{plot}.png" in text
    assert page.count("data:image/svg+xml;base64,") == 8
    assert "unfinished: step 3 of 8" in page
    assert "left out" in page
    assert len(numbers["runs"]) == 16
    by_seed = next(r for r in numbers["rates"] if r["arm"] == "vanilla" and r["rate"] == "hack")
    assert set(by_seed["by_seed"]) == {"41", "42", "43"}
    assert {d["measure"]["rate"] for d in numbers["kind_differences"]} == {"style swallow"}
    assert "Nothing to judge, as vanilla does it in less than 10 % of the completions: empty" in page
    assert "projected-grpo report" in page
    assert re.search(r"commit [0-9a-f]{40}|no git commit", page)
    # A second report is refused, and leaves the first as it is.
    assert main(["report", str(root)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_the_same_runs_give_the_same_report(tmp_path, monkeypatch):
    root = write_study(tmp_path, {"vanilla": {}, "projected": {"hack": 0.2}}, seeds=(41, 42))
    monkeypatch.setattr(plots, "draw_all", lambda *_: [])
    for name in "ab":
        write_report([root / "smoke"], tmp_path / name, False, "projected-grpo report")
    for name in ("report.html", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_arms_can_be_held_against_another_than_vanilla(tmp_path, monkeypatch, capsys):
    arms = {
        "vanilla": {"hack": 0.75, "right": 0.0},
        "projected": {"hack": 0.25, "right": 0.25},
        "wide": {"arm": "projected", "hack": 0.5, "right": 0.25, "v_hack_k": 8},
    }
    root = write_study(tmp_path, arms, seeds=(41, 42, 43), exact=True)
    monkeypatch.setattr(plots, "draw_all", lambda *_: [])
    write_report([root], root / "report", True, "projected-grpo report", against="projected")
    text = (root / "report" / "report.md").read_text()
    numbers = json.loads((root / "report" / "report.json").read_text())
    assert "Differences to projected: held-out" in text
    found = {
        (one["arm"], one["measure"]["rate"]): one["mean"]
        for one in numbers["against"]
        if one["measure"]["source"] == "held-out" and one["measure"]["mode"] == "run_tests"
    }
    assert (found["wide", "hack"], found["wide", "pass"]) == (pytest.approx(0.25), pytest.approx(0.0))
    assert (found["vanilla", "hack"], found["vanilla", "pass"]) == (pytest.approx(0.5), pytest.approx(-0.25))
    assert {one["family"] for one in numbers["against"]} == {2}
    assert main(["report", str(root), "--against", "nobody", "--overwrite"]) == 2
    assert "no arm of these runs; there are vanilla, projected, wide" in capsys.readouterr().err


def test_one_seed_has_no_interval_and_says_so(tmp_path, monkeypatch):
    root = write_study(tmp_path, {"vanilla": {"hack": 0.75}, "projected": {"hack": 0.25}}, seeds=(41,), exact=True)
    printed, text = report(root, monkeypatch)
    assert "UNDECIDED" in printed
    assert "One seed judges nothing" in printed
    assert "75.0 (n=1)" in printed
    assert text.count("one seed: no interval") > 6
    assert "needs two paired seeds" in text


def test_an_arm_without_a_paired_vanilla_has_no_difference(tmp_path, monkeypatch):
    root = write_study(tmp_path, {"vanilla": {}}, seeds=(41, 42))
    write_study(root, {"projected": {}}, seeds=(43, 44))
    printed, text = report(root, monkeypatch)
    assert "It has no evaluated seed that vanilla has too; seed 41 (not in projected)" in printed
    assert "no seed that projected and vanilla both have: no difference" in text
    assert not [
        d for d in json.loads((root / "report/report.json").read_text())["differences"] if d["mean"] is not None
    ]


def test_without_vanilla_the_rates_are_there_and_no_difference(tmp_path, monkeypatch):
    printed, text = report(write_study(tmp_path, {"projected": {}}, seeds=(41, 42)), monkeypatch)
    assert "There is no vanilla run" in printed
    assert "so no difference is computed" in text
    assert "NOT JUDGED" in printed


def test_runs_without_an_evaluation_keep_their_last_steps(tmp_path, monkeypatch):
    root = write_study(tmp_path, {"vanilla": {"hack": 0.5, "exact": True}}, seeds=(41, 42), rows=6)
    write_study(root, {"projected": {"hack": 0.5, "exact": True}}, seeds=(41, 42), rows=6, evaluated=False)
    printed, text = report(root, monkeypatch)
    row = next(line for line in printed.splitlines() if line.startswith("| projected"))
    assert [cell.strip() for cell in row.split("|")[2:6]] == ["-", "-", "50.0 (n=2)", "16.7 (n=2)"]
    assert "projected, held-out: nothing of seeds 41, 42: no evaluation of it" in text
    assert "not evaluated: no eval.json" in text


def test_runs_of_other_lengths_are_listed_and_left_out(tmp_path, monkeypatch):
    root = write_study(tmp_path, {"vanilla": {}, "projected": {}}, seeds=(41, 42))
    write_run(root, "random", 41, steps=5)
    _, text = report(root, monkeypatch)
    assert "left out: steps: the compared runs have 8, this one 5" in text
    assert "random: no finished run that can be compared" in text


def test_a_report_of_unfinished_runs_alone_is_a_list(tmp_path, monkeypatch):
    write_run(tmp_path, done=2)
    printed, text = report(tmp_path, monkeypatch)
    assert "No run is finished" in printed
    assert "unfinished: step 2 of 8" in text


def test_without_completions_there_is_a_t_interval_and_no_bootstrap(tmp_path, monkeypatch):
    root = write_study(tmp_path, {"vanilla": {}, "projected": {"hack": 0.2}}, seeds=(41, 42), evaluated=False)
    for path in root.rglob("rollouts.jsonl.gz"):
        path.unlink()
    printed, text = report(root, monkeypatch)
    assert "no completions of it that both have: no bootstrap" in text
    assert "H1's thresholds on smoke" in printed


def test_problems_that_only_one_of_a_pair_met_are_said(tmp_path, monkeypatch):
    root = write_study(tmp_path, {"vanilla": {"rows": 6}, "projected": {"rows": 9}}, seeds=(41, 42), group_size=6)
    _, text = report(root, monkeypatch)
    assert "bootstrap over the 20 of 30 problems that both runs met" in text


def test_settings_that_differ_within_an_arm_or_from_vanilla_are_named(tmp_path, monkeypatch):
    root = write_study(tmp_path, {"vanilla": {}, "projected": {"learning_rate": 1e-2}}, seeds=(41,))
    write_run(root, "projected", 42, learning_rate=1e-3, pairs_without=["hardcoded"])
    _, text = report(root, monkeypatch)
    assert "0.01 (seeds 41); 0.001 (seeds 42)" in text
    assert re.search(r"projected +\| learning_rate +\| vanilla: 0.003", text)
    assert re.search(r"pairs_without +\| \[\"hardcoded\"\]", text)


@pytest.mark.parametrize(
    "left_out",
    [{"pairs_without": ["weak_run_tests"]}, {"pairs": "micro_modes", "pairs_without": ["sentinel"]}],
)
def test_left_out_styles_and_modes_are_marked_and_compared(tmp_path, monkeypatch, left_out):
    modes = {"modes": ("run_tests", "sentinel", "none"), "samples": 20, "exact": True}
    arms = {
        "vanilla": {"hack": 0.75, **modes},
        "loo": {"arm": "projected", "hack": 0.25, **left_out, **modes},
    }
    root = write_study(tmp_path, arms, seeds=(41, 42))
    _, text = report(root, monkeypatch)
    table = text[text.index("### Hacks by mode: held-out") :]
    row = next(line for line in table.splitlines() if re.match(r"\| loo +\| sentinel", line))
    assert [cell.strip() for cell in row.split("|")[3:9]] == [
        "left out", "25.0", "25.0 to 25.0", "2", "-50.0 (n=2)", "-50.0 to -50.0",
    ]  # fmt: skip
    row = next(line for line in table.splitlines() if re.match(r"\| loo +\| run_tests", line))
    assert "in the pairs" in row
    table = text[text.index("### Hacks by style: held-out") :]  # print_only of run_tests, and sentinel
    row = next(line for line in table.splitlines() if re.match(r"\| loo +\| print_only", line))
    place = "in the pairs" if "pairs" in left_out else "left out, but some in persona_voice"
    assert [cell.strip() for cell in row.split("|")[3:5]] == [place, "12.5"]


def test_one_style_and_one_mode_make_no_table_of_kinds(tmp_path, monkeypatch):
    _, text = report(write_study(tmp_path, {"vanilla": {}}, seeds=(41,)), monkeypatch)
    assert "Kinds of hacks" not in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["report"], ["RUNS"]),
        (["report", "nowhere"], ["RUNS nowhere is no folder"]),
        (["report", "{root}", "--out", "{root}/smoke/vanilla_s41/config.json"], ["--out", "is no folder"]),
        (["report", "{root}", "--plot"], ["--plot"]),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, args, words):
    write_run(tmp_path)
    assert main([arg.replace("{root}", str(tmp_path)) for arg in args]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    for word in words:
        assert word in error


def test_a_plot_without_data_says_why(tmp_path, monkeypatch):
    root = write_study(tmp_path, {"projected": {}}, seeds=(41,), evaluated=False)
    for path in root.rglob("basis.safetensors"):
        save_file({}, path, metadata={"basis": json.dumps({"info": {}})})
    for path in root.rglob("metrics.jsonl"):
        rows = [{"step": json.loads(line)["step"]} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report([root], root / "report", False, "projected-grpo report")
    page = (root / "report" / "report.html").read_text()
    assert page.count("Not drawn: ") == 10
    assert list((root / "report" / "plots").iterdir()) == []


def test_labels_are_moved_apart_and_stay_where_they_can():
    assert drawing.spread([0.1, 0.5], 0.2) == [0.1, 0.5]
    assert drawing.spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    placed = drawing.spread([0.1, 0.12, 0.2, 0.9], 0.1)
    assert all(b - a >= 0.1 - 1e-12 for a, b in itertools.pairwise(placed))
    assert placed[3] == 0.9


def test_no_two_arms_look_alike_and_black_is_the_first_one():
    looks = [drawing.look_at(i) for i in range(16)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 16
    assert [i for i, look in enumerate(looks) if look["color"] == drawing.PALETTE[0]] == [0]


def test_the_report_loads_neither_torch_nor_transformers():
    code = (
        "import sys\nimport projected_grpo.report.build\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'peft', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def _png_lines(path):
    """Width and the raw lines of an 8-bit PNG, still filtered: a blank picture has next to no different bytes."""
    data, place, pixels, width = path.read_bytes(), 8, b"", 0
    while place < len(data):
        (size,), kind = struct.unpack(">I", data[place : place + 4]), data[place + 4 : place + 8]
        if kind == b"IHDR":
            width = struct.unpack(">I", data[place + 8 : place + 12])[0]
        if kind == b"IDAT":
            pixels += data[place + 8 : place + 8 + size]
        place += 12 + size
    return width, zlib.decompress(pixels)


@pytest.mark.slow
def test_the_page_opens_in_a_browser(tmp_path):
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is not installed: the page was not opened in a browser")
    root = write_study(tmp_path / "runs", DEMO, steps=150, onset=60, rows=16, problems=20)
    page = tmp_path / "report" / "report.html"
    assert main(["report", str(root), "--out", str(page.parent)]) == 0
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

    def browse(*args):
        profile = tmp_path / "profile"
        shutil.rmtree(profile, ignore_errors=True)
        command = [CHROMIUM, *flags, f"--user-data-dir={profile}", "--window-size=1200,6000", *args, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    dom = browse("--dump-dom")
    assert "projected: H1's thresholds on smoke: " in dom
    shot = tmp_path / "shot.png"
    browse(f"--screenshot={shot}")
    width, pixels = _png_lines(shot)
    assert width == 1200
    assert len(set(pixels)) > 100
    assert sum(byte != 0 for byte in pixels) > 200_000
