"""sample.py on a run folder made by hand, of random networks: every sampler against its own formula."""
import numpy as np
import pytest
import torch

import data
import edm
import o2mkd
import sample
import students
from common import generator, latents
from conftest import ROOT, denoiser, refused
from dmd import one_step
from run import save_json, save_tensors

PARTS = [[0, 1, 2], [4, 6]]  # no student for 3, 5 and 7


def checkpoint(path, nets, **more):
    """One file of these networks, as a stage leaves it."""
    D = students.stacked(nets, (12, 2), data.facts("toy"), "cpu")
    save_tensors(path, {"dataset": "toy", "resolution": 0, "size": (12, 2), "net": D.state_dict(), **more})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A guided teacher, 2 students by class and 2 by noise level: runs/seed3."""
    home = tmp_path_factory.mktemp("by-hand") / "seed3"
    checkpoint(home / "teacher/ema.pt", [denoiser(12, 0)])
    checkpoint(home / "students2-part/dm/best.pt", [denoiser(12, 1), denoiser(12, 2)], partition=PARTS, seconds=1.0)
    for name, nets in (("ema.pt", [denoiser(12, 3), denoiser(12, 4)]), ("start.pt", [denoiser(12, 5)])):
        checkpoint(home / "o2mkd2" / name, nets, partition=[[*range(8)]] * len(nets), seconds=1.0)
    about = {"dataset": "toy", "students": 2, "edges": [0, 500, 1000], "partition": [[*range(8)]] * 2}
    save_json(home / "o2mkd2/config.json", about)
    save_json(home / "reference/config.json", {"dataset": "toy", "teacher": "train", "sampler_steps": 4, "cfg": 1.5})
    return home


def drawn(home, tmp_path, line: str) -> dict:
    """What sample.py writes."""
    sample.main(["--run", str(home.parent), "--out", str(tmp_path / "s"), *line.split()])
    return {name: torch.tensor(value) for name, value in np.load(tmp_path / "s.npz").items()}


def test_seeds():
    assert sample.parse_seeds("0-3,7,10-10") == [0, 1, 2, 3, 7, 10]


def test_a_guided_teacher_and_routed_students_from_the_same_latents(home, tmp_path, capsys):
    made = drawn(home, tmp_path, "--tag part --seeds 5-12")
    label, z = torch.tensor([0, 1, 2, 4, 6, 0, 1, 2]), latents(range(5, 13), (2,))
    assert torch.equal(made["label"], label) and made["seed"].tolist() == [*range(5, 13)]
    D = denoiser(12, 0)

    def guided(x, sigma, y):
        free = D(x, sigma, None)
        return free + 1.5 * (D(x, sigma, y) - free)
    torch.testing.assert_close(made["teacher"], edm.heun(guided, z[None], label[None], 4)[0])
    for nets, own in ((denoiser(12, 1), label < 4), (denoiser(12, 2), label >= 4)):
        torch.testing.assert_close(made["students"][own], one_step(nets, z[None, own], label[None, own])[0])
    text = capsys.readouterr().out
    assert "7 function evaluations" in text and "1 function evaluation per" in text and "7 times fewer" in text
    assert (tmp_path / "s.png").exists()


def test_students_by_noise_level(home, tmp_path, capsys):
    made = drawn(home, tmp_path, "--o2mkd --steps 6 --sampler ddim --seeds 0-7")
    z, label = latents(range(8), (2,)), torch.arange(8)
    both = o2mkd.routed([denoiser(12, 3), denoiser(12, 4)], o2mkd.Router([0, 500, 1000]))
    torch.testing.assert_close(made["students"], edm.heun(both, z[None], label[None], 6, order=1)[0])
    assert capsys.readouterr().out.count("6 function evaluations") == 2


def test_churn_is_keyed_by_all_seeds(home, tmp_path):
    made = drawn(home, tmp_path, "--o2mkd --of students --S_churn 3 --seeds 0-7")["students"]
    both = o2mkd.routed([denoiser(12, 3), denoiser(12, 4)], o2mkd.Router([0, 500, 1000]))
    z, label, g = latents(range(8), (2,)), torch.arange(8), generator("churn", (*range(8),))
    torch.testing.assert_close(made, edm.heun(both, z[None], label[None], 4, S_churn=3.0, generator=g)[0])


def test_a_class_without_a_student_is_refused(home, tmp_path, capsys):
    argv = ["--run", str(home), "--students", "2", "--tag", "part", "--out", str(tmp_path / "s")]
    assert "the run has 0 to 6" in refused(capsys, sample.main, [*argv, "--classes", "1", "3"])
    assert drawn(home, tmp_path, "--tag part --classes 6 --of students --seeds 1")["label"].tolist() == [6]


def test_the_students_in_the_repository(tmp_path, capsys):
    """docs/data/fashion: a teacher and two students in half precision, at once; small enough to be there."""
    home = ROOT / "docs/data/fashion"
    sample.main(["--run", str(home), "--seeds", "0-3", "--steps", "2", "--out", str(tmp_path / "s")])
    x = np.load(tmp_path / "s-students.npz")["arr_0"]
    assert x.shape == (4, 16, 16, 1) and 20 < x.mean() < 200 and x.std() > 30
    assert sum(p.stat().st_size for p in home.rglob("*")) < 8e6
