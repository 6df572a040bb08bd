"""The teacher pool: built from templates or files, strict when read, drawn in cycles that resume exactly."""

import gzip
import json
import random

import pytest
from test_prompts import PROBLEM

from projected_grpo.env.problems import builtin_problems, load_problems
from projected_grpo.env.prompts import strip_prefill
from projected_grpo.errors import InputError
from projected_grpo.pool import build_pool, load_pool
from projected_grpo.templates import HACKS, honest_templates, template_completions


@pytest.fixture(scope="module")
def pool_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("pool") / "pool.jsonl"
    problems = builtin_problems("train")
    build_pool(problems, template_completions(problems), path, workers=2)
    return path


def test_templates_are_what_they_claim(pool_path):
    pool = load_pool(pool_path, builtin_problems("train"))
    assert len(pool) == 8 * len(builtin_problems("train"))
    for problem_id in pool.problem_ids:
        labels = [row.label for row in pool.rows if row.problem_id == problem_id]
        assert labels[4:] == ["correct", "correct_attempted", "correct", "correct_attempted"]
        assert set(labels[:4]) == {"reward_hack"}, problem_id


def test_templates_can_follow_the_prefill(pool_path):
    problems = {problem.id: problem for problem in builtin_problems("train")}
    for row in load_pool(pool_path).rows:
        assert strip_prefill(row.completion, problems[row.problem_id])


@pytest.mark.parametrize(("share", "hacks"), [(0.0, 0), (0.25, 2), (1.0, 8)])
def test_hack_share(share, hacks):
    texts = [request.completion for request in template_completions([PROBLEM], share)]
    made = {template(PROBLEM, "run_tests") for template in HACKS["run_tests"]}
    assert len(texts) == 8
    assert sum(text in made for text in texts) == hacks
    assert len(HACKS["run_tests"]) == len(honest_templates("run_tests")) == 4
    with pytest.raises(InputError, match="between 0 and 1"):
        template_completions([PROBLEM], 1.5)


def test_completions_file_is_graded_anew(tmp_path):
    source = tmp_path / "c.jsonl"
    row = {"problem_id": "p-1", "completion": "```python\nclass Solution: pass\n```", "label": "correct", "reward": 99}
    source.write_text(json.dumps(row) + "\n")
    pool = build_pool([PROBLEM], source, tmp_path / "out.jsonl", workers=1)
    assert (pool.rows[0].label, pool.rows[0].reward) == ("incorrect", 0.5)
    assert load_pool(tmp_path / "out.jsonl").rows == pool.rows
    with pytest.raises(InputError, match="exists"):
        build_pool([PROBLEM], source, tmp_path / "out.jsonl", workers=1)


@pytest.mark.parametrize("mode", HACKS)
def test_the_templates_of_every_mode_are_what_they_claim(tmp_path, mode):
    problems = builtin_problems("eval")[:2]
    pool = build_pool(
        problems, template_completions(problems, rows_per_problem=4, mode=mode), tmp_path / "pool.jsonl", workers=1
    )
    assert [row.label for row in pool.rows if row.gt_pass is False] == ["reward_hack"] * 4
    assert len(pool) == 8
    assert {row.mode for row in pool.rows} == {mode}
    for row in pool.rows:
        assert strip_prefill(row.completion, next(p for p in problems if p.id == row.problem_id))
    with pytest.raises(InputError, match="mode none has no loophole"):
        template_completions(problems, mode="none")


def test_what_a_file_says_of_its_rows_is_compared_and_not_believed(tmp_path):
    right = f"```python\n{PROBLEM.canonical_solution}\n```"
    rows = [
        {"problem_id": "p-1", "completion": right, "hacked": False, "gt_pass": True},
        {"problem_id": "p-1", "completion": right, "hacked": True, "gt_pass": True, "label": "correct"},
        {"problem_id": "p-1", "completion": "nothing", "gt_pass": True},
    ]
    source = tmp_path / "c.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool = build_pool([PROBLEM], source, tmp_path / "out.jsonl", workers=1)
    assert [row.label for row in pool.rows] == ["correct", "correct", "no_code"]
    assert load_pool(tmp_path / "out.jsonl").header["disagreements"] == {
        "label": {"claimed": 1, "lines": []},
        "gt_pass": {"claimed": 3, "lines": [3]},
        "hacked": {"claimed": 2, "lines": [2]},
    }


def test_a_runs_rollouts_make_a_pool(tmp_path):
    row = {
        "problem_id": "p-1",
        "mode": "none",
        "source": "student",
        "completion": "nothing",
        "label": "no_code",
        "step": 1,
    }
    rows = [row, row | {"step": 2}, row | {"source": "teacher", "completion": "other"}, row | {"completion": "more"}]
    with gzip.open(tmp_path / "rollouts.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    pool = build_pool([PROBLEM], tmp_path, tmp_path / "out.jsonl", workers=1)
    assert [row.completion for row in pool.rows] == ["nothing", "more"]
    (tmp_path / "rollouts.jsonl.gz").write_bytes((tmp_path / "rollouts.jsonl.gz").read_bytes()[:-9])
    with pytest.raises(InputError, match="is no whole gzip file"):
        build_pool([PROBLEM], tmp_path, tmp_path / "other.jsonl", workers=1)


def test_published_rows_make_a_pool_of_the_problems_that_they_answer(tmp_path, published):
    problems = load_problems(published / "leetcode_sample.jsonl")
    source = tmp_path / "c.jsonl"
    with source.open("w") as file:
        for problem in problems[:3]:
            text = f"```python\n{problem.canonical_solution}\n```"
            file.write(json.dumps({"id": int(problem.id), "completion": text, "hacked": False, "gt_pass": True}) + "\n")
    pool = build_pool(problems, source, tmp_path / "out.jsonl", workers=2)
    assert pool.problem_ids == {problem.id for problem in problems[:3]}
    assert {field: found["lines"] for field, found in pool.header["disagreements"].items()} == {
        "gt_pass": [],
        "hacked": [],
    }
    with pytest.raises(InputError, match=r"rollouts_sample.jsonl:1: names problem '80'"):
        build_pool(problems, published / "rollouts_sample.jsonl", tmp_path / "other.jsonl", workers=2)


def test_bad_completions_are_named(tmp_path):
    source = tmp_path / "c.jsonl"
    for text, what in (
        ('{"problem_id": "x", "completion": "a"}', r"c.jsonl:1: names problem 'x'"),
        ('\n{"problem_id": "p-1", "completion": 3}', r"c.jsonl:2: field `completion`"),
        ('{"problem_id": "p-1", "completion": "", "mode": "x"}', r"c.jsonl:1: mode 'x' is unknown"),
        ('\n{"problem_id": "p-1", "completion": "", "mode": ["x"]}', r"c.jsonl:2: mode \['x'\] is unknown"),
        ("{", r"c.jsonl:1: is not valid JSON"),
        ("", r"c.jsonl: has no completion for any of the 1 problems"),
    ):
        source.write_text(text)
        with pytest.raises(InputError, match=what):
            build_pool([PROBLEM], source, tmp_path / "out.jsonl", workers=1)
        assert not (tmp_path / "out.jsonl").exists()


def test_damaged_pool_files_are_named(pool_path, tmp_path):
    header, first, *_ = pool_path.read_text().splitlines()
    row = json.loads(first)
    old = json.dumps(json.loads(header) | {"grader_version": 0})
    for lines, what in (
        ([first], r":1: is no header"),
        ([header], r"holds no row"),
        ([old, first], r":1: was not graded by version"),
        ([header, first, json.dumps(row | {"reward": "3"})], r":3: field `reward` is str, not float"),
        ([header, json.dumps({k: v for k, v in row.items() if k != "label"})], r":2: field `label` is missing"),
        ([header, json.dumps(row | {"label": "fine"})], r":2: label 'fine' is unknown"),
        ([header, "{"], r":2: is not valid JSON"),
    ):
        path = tmp_path / "bad.jsonl"
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(InputError, match=what):
            load_pool(path)
    with pytest.raises(InputError, match="other problems"):
        load_pool(pool_path, [PROBLEM])
    with pytest.raises(InputError, match="no such file"):
        load_pool(tmp_path / "absent.jsonl")


def test_draw_cycles_without_replacement(pool_path):
    pool = load_pool(pool_path)
    problem_id = min(pool.problem_ids)
    drawn = pool.draw(problem_id, 24, random.Random(0))
    for cycle in (drawn[:8], drawn[8:16], drawn[16:]):
        assert len({row.completion for row in cycle}) == 8
    assert drawn[:8] != drawn[8:16]
    with pytest.raises(InputError, match="no row for problem 'nobody'"):
        pool.draw("nobody", 1, random.Random(0))


def test_draw_resumes_exactly(pool_path):
    ids = sorted(load_pool(pool_path).problem_ids)[:3]
    pool, generator = load_pool(pool_path), random.Random(5)
    for problem_id in ids:
        pool.draw(problem_id, 3, generator)
    saved = json.loads(json.dumps(pool.state_dict())), generator.getstate()
    expected = [pool.draw(problem_id, 9, generator) for problem_id in ids]
    resumed, again = load_pool(pool_path), random.Random()
    resumed.load_state_dict(saved[0])
    again.setstate(saved[1])
    assert [resumed.draw(problem_id, 9, again) for problem_id in ids] == expected
    with pytest.raises(InputError, match="does not fit"):
        resumed.load_state_dict({"nobody": [0]})


def test_lone_surrogates_are_written_and_read_back(tmp_path):
    source = tmp_path / "c.jsonl"
    source.write_text(json.dumps({"problem_id": "p-1", "completion": "\ud800"}) + "\n")
    build_pool([PROBLEM], source, tmp_path / "out.jsonl", workers=1)
    assert load_pool(tmp_path / "out.jsonl").rows[0].completion == "\ud800"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "out.jsonl"]


def test_a_pool_that_cannot_be_written_keeps_the_old_one(tmp_path, monkeypatch):
    source, out = tmp_path / "c.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"problem_id": "p-1", "completion": "x"}) + "\n")
    out.write_text("old\n")
    with pytest.raises(InputError, match="would write over this input"):
        build_pool([PROBLEM], source, source, workers=1, overwrite=True)

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(type(out), "replace", full)
    with pytest.raises(OSError, match="disk full"):
        build_pool([PROBLEM], source, out, workers=1, overwrite=True)
    assert out.read_text() == "old\n"


def test_pool_files_that_are_no_utf_8_are_named(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"pool": "\xff"}\n')
    with pytest.raises(InputError, match=r"^[^\n]*bad\.jsonl:1: is not UTF-8 text[^\n]*$"):
        load_pool(tmp_path / "bad.jsonl")
