"""What moved along the real basis, and what the first steps tell of the end, on synthetic runs."""

import itertools
import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_report_material import write_basis, write_run

from projected_grpo.report.compare import make_study
from projected_grpo.report.mechanism import (
    displacement_table,
    displacements,
    prediction_table,
    predictions,
    step_table,
    within_arms,
)
from projected_grpo.report.observe import observe_all
from projected_grpo.report.runs import find_runs

V = {
    "layers.0.a": np.array([[1, 0, 0, 0], [0, 1, 0, 0]], np.float32),
    "layers.1.b": np.array([[0, 0.6, 0.8]], np.float32),
}
PRINTS = {name: np.arange(5) + i for i, name in enumerate(V)}


def study_of(root):
    return make_study(*observe_all(find_runs([root])))


def add_directions(folder):
    path = folder / "basis.safetensors"
    tensors = {f"directions/{name}": v for name, v in V.items()}
    tensors |= {f"fingerprints/{name}": value for name, value in PRINTS.items()}
    info = {"kind": "real", "model_fingerprint": "f00d", "delta_norm": 0.0}
    save_file(tensors, path, metadata={"basis": json.dumps({"format": "2", "info": info})})


def add_adapter(folder, deltas, prints=PRINTS):
    tensors = {f"base_model.model.{name}.delta_s": delta for name, delta in deltas.items()}
    tensors |= {f"base_model.model.{name}.delta_s_fingerprint": value for name, value in prints.items()}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")


def test_displacement_is_along_vanillas_basis_by_hand(tmp_path):
    vanilla, random = write_run(tmp_path, exact=True), write_run(tmp_path, "random", hack=0.5, exact=True)
    add_directions(vanilla)
    write_basis(random / "basis.safetensors", kind="random")
    first, second = np.array([-1, 2, 0, 2], np.float32), np.array([0, 1, 0.5], np.float32)
    add_adapter(random, {"layers.0.a": first, "layers.1.b": second, "layers.9.unprojected": first})
    study = study_of(tmp_path)
    (found,) = displacements(study).values()  # vanilla here has no adapter's weights
    along = [-1, 2, 0.6 + 0.4]
    assert found.along == pytest.approx(sum(along) / 3)
    assert found.norm == pytest.approx(math.sqrt(9 + 1.25))
    assert found.in_span == pytest.approx((1 + 4 + 1) / (9 + 1.25))
    row = displacement_table(study, displacements(study)).rows[0]
    assert row == ["random", "1", "+0.67", "-", "58.5", "3.20", "50.0", "25.0"]


def test_the_steps_table_is_the_mean_of_what_was_logged(tmp_path):
    folders = [write_run(tmp_path, "projected", seed) for seed in (41, 42)]
    add_directions(folders[0])
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    (cells,) = step_table(study_of(tmp_path)).rows
    assert cells[:2] == ["projected", "2"]
    shares = [np.mean([np.mean([row[key] for row in run]) for run in rows]) for key in ("cin", "cin_null", "cup_out")]
    assert [cells[3], cells[4], cells[8]] == [f"{share:.3f}" for share in shares]
    assert [cells[5], cells[6], cells[7], cells[9]] == ["-"] * 4  # not logged here
    assert cells[10] == f"{np.mean([run[-1]['v_delta'] for run in rows]):+.2f}"


def test_an_adapter_over_other_factors_is_not_measured(tmp_path):
    vanilla = write_run(tmp_path)
    add_directions(vanilla)
    deltas = {name: v[0] for name, v in V.items()}
    add_adapter(vanilla, deltas)
    assert len(displacements(study_of(tmp_path))) == 1
    add_adapter(vanilla, deltas, PRINTS | {"layers.1.b": np.zeros(5, int)})
    assert displacements(study_of(tmp_path)) == {}
    add_adapter(vanilla, deltas | {"layers.1.b": np.zeros(7, np.float32)})
    assert displacements(study_of(tmp_path)) == {}
    (vanilla / "adapter" / "adapter_model.safetensors").write_bytes(b"torn")
    assert displacements(study_of(tmp_path)) == {}


def write_early(root, arm, outcomes, early):
    """Runs whose hack rate of the first steps is `early`, and whose held-out one is `outcomes`."""
    for seed, (outcome, first) in enumerate(zip(outcomes, early, strict=True)):
        folder = write_run(root, arm, seed, hack=outcome, right=0.0, exact=True, samples=20, steps=40)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            row["hack_student"] = first if row["step"] <= 20 else 1 - first
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_only_the_first_steps_predict_and_only_within_arms(tmp_path):
    # Within each arm the order is the same; between them it is turned round, which must not count.
    write_early(tmp_path, "vanilla", [0.6, 0.7, 0.8, 0.9], [0.1, 0.2, 0.3, 0.4])
    write_early(tmp_path, "projected", [0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.6, 0.7, 0.8, 0.9])
    write_early(tmp_path, "random", [0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4])  # nothing to predict
    write_early(tmp_path, "flipped", [0.5, 0.6, 0.7], [0.1, 0.2, 0.3])  # too few
    found = predictions(study_of(tmp_path))
    hack = next(one for one in found if one.predictor == "hack rate" and one.outcome.startswith("hack"))
    assert hack.by_arm == {"vanilla": (pytest.approx(1.0), 4), "projected": (pytest.approx(1.0), 5)}
    assert (hack.pooled, hack.n_seeds) == (pytest.approx(1.0), 4)
    assert hack.p == pytest.approx(2 / 24)  # this order of four seeds, and the one turned round
    assert "projected +1.00" in prediction_table(found).rows[0][2]


def test_short_runs_have_no_early_steps(tmp_path):
    write_early(tmp_path, "vanilla", [0.6, 0.7, 0.8, 0.9], [0.1, 0.2, 0.3, 0.4])
    assert predictions(study_of(tmp_path))
    write_run(tmp_path / "short", "vanilla", steps=39)
    assert predictions(study_of(tmp_path / "short")) == []
    assert prediction_table([]) is None


def test_the_permutation_p_is_that_of_all_orders_of_seeds():
    generator = np.random.default_rng(3)
    groups = [generator.normal(size=(5, 2)) for _ in range(3)]
    ranks = [group.argsort(axis=0).argsort(axis=0) - 2 for group in groups]
    scale = math.sqrt(sum((r[:, 0] ** 2).sum() for r in ranks) * sum((r[:, 1] ** 2).sum() for r in ranks))
    every = [sum(r[:, 0] @ r[list(order), 1] for r in ranks) / scale for order in itertools.permutations(range(5))]
    pooled, p = within_arms(groups)
    assert pooled == pytest.approx(every[0])
    assert p == pytest.approx(np.mean([abs(r) >= abs(every[0]) - 1e-12 for r in every]))
    drawn = within_arms(groups, draws=100)[1]  # fewer than there are orders
    assert drawn == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 100) + 0.01)


def test_the_same_runs_under_two_names_are_no_more_evidence():
    one = np.random.default_rng(4).normal(size=(6, 2))
    assert within_arms([one, one, one]) == pytest.approx(within_arms([one]))
