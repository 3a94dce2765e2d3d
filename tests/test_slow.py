"""The main job at full size. Runs with --run-slow: minutes on two cores."""
import json

import pytest

import msd


@pytest.mark.slow
def test_main_job_keeps_its_musts(tmp_path):
    """On a seed that nothing was tuned on or reported of: a good teacher; K = 8 near it, far below K = 1, no mode lost."""
    assert msd.main(["--dataset", "toy", "--students", "8", "--seed", "6", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    one, eight = (results["students"][K] for K in "18")
    assert results["teacher"]["l1_data"] <= 0.10
    assert eight["l1"] <= 0.20 and eight["l1"] <= one["l1"] - 0.10
    assert eight["within"] >= 0.88 and eight["mode_min"] >= 0.65 and eight["mode_max"] <= 1.3
