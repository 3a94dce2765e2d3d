"""The main job at full size. Runs with --run-slow: minutes on two cores."""
import json

import pytest

import msd


@pytest.mark.slow
def test_main_job_reaches_its_figures(tmp_path):
    """Teacher within 0.15 of the data; students within 0.25 of it, 85 % within 4 std, no mode below half its share."""
    assert msd.main(["--dataset", "toy", "--students", "8", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    students = results["students"]["8"]
    assert results["teacher"]["l1_data"] <= 0.15 and students["l1"] <= 0.25
    assert students["within"] >= 0.85 and students["mode_min"] >= 0.5 and students["mode_max"] <= 2
