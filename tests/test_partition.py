"""Partitions: disjoint, covering, deterministic; k-means does not see the order of the classes; the router agrees."""
import shutil

import pytest
import torch

import msd
from conftest import refused
from run import load_json
from students import load_students

pytestmark = pytest.mark.usefixtures("undrawn")
SMOKE = ["--preset", "smoke"]


def blobs(sizes=(4, 3, 5, 4), d=6, seed=0):
    """Well separated clusters of embeddings in a mixed order, and which cluster each is of."""
    g = torch.Generator().manual_seed(seed)
    centre = 10 * torch.randn(len(sizes), d, generator=g)
    k = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    k = k[torch.randperm(len(k), generator=g)]
    return centre[k] + 0.1 * torch.randn(len(k), d, generator=g), k


def as_sets(parts):
    return {frozenset(p.tolist()) for p in parts}


@pytest.mark.parametrize("how", ["consecutive", "random", "kmeans"])
@pytest.mark.parametrize("classes, K", [*((8, K) for K in range(1, 9)), (16, 4), (100, 7)])
def test_disjoint_covering_and_deterministic(how, classes, K):
    E = torch.randn(classes, 5, generator=torch.Generator().manual_seed(1))
    parts = msd.partition(classes, K, how, E, seed=3)
    assert len(parts) == K and torch.cat(parts).sort().values.tolist() == list(range(classes))
    assert all(len(p) and (p.diff() > 0).all() for p in parts)
    assert all(map(torch.equal, parts, msd.partition(classes, K, how, E, seed=3)))
    if how != "kmeans":
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if how == "random" and K == 4:
        assert as_sets(parts) != as_sets(msd.partition(classes, K, how, E, seed=4))


@pytest.mark.parametrize("classes, K, how, E, words", [
    (8, 0, "consecutive", None, "--students 0"), (8, 9, "random", None, "--students 9"),
    (8, 9, "kmeans", torch.eye(8), "--students 9"),
    (8, 3, "quadrant", torch.tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]] * 2), "left over"),
    (8, 4, "quadrant", torch.ones(8, 2), "empty")])
def test_what_cannot_be_split(classes, K, how, E, words):
    with pytest.raises(msd.UserError, match=words):
        msd.partition(classes, K, how, E)


def test_kmeans_finds_the_clusters_whatever_the_order():
    E, k = blobs()
    assert as_sets(msd.partition(16, 4, "kmeans", E)) == as_sets([(k == i).nonzero()[:, 0] for i in range(4)])
    noise = torch.randn(40, 8, generator=torch.Generator().manual_seed(5))  # no clusters at all: still the same split
    first = as_sets(msd.partition(40, 5, "kmeans", noise, seed=2))
    for s in range(5):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(s))
        again = msd.partition(40, 5, "kmeans", noise[order], seed=2)
        assert as_sets([order[p] for p in again]) == first


def test_an_empty_cluster_starts_again_and_says_so(capsys):
    E = torch.zeros(6, 3)
    E[3:] = 1.0  # two different conditions, four clusters
    parts = msd.partition(6, 4, "kmeans", E)
    assert len(parts) == 4 and all(map(len, parts)) and torch.cat(parts).sort().values.tolist() == list(range(6))
    assert "ran empty" in capsys.readouterr().out


def test_quadrants():
    angle = torch.tensor([0.3, 1.2, 2.0, 3.0, 3.5, 4.5, 5.0, 6.0])
    E = torch.cat([torch.stack([angle.cos(), angle.sin()], -1), torch.randn(8, 3)], 1)
    assert [p.tolist() for p in msd.partition(8, 4, "quadrant", E)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("text, words", [
    ("0 1 2 3\n4 5 6\n", "class 7"), ("0 1 2 3\n3 4 5 6 7\n", "class 3"), ("0 1 2 3\n4 5 6 7 8\n", "class 8"),
    ("0 1 2 three\n4 5 6 7\n", "three"), ("0 1 2\n3 4\n5 6 7\n", "--students 2"), ("9" * 5000, "mine.txt"),
    (bytes([255, 254, 0, 1, 200]), "mine.txt"), (None, "mine.txt")])
def test_a_bad_partition_file(tmp_path, text, words):
    path = tmp_path / "mine.txt"
    if text:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(msd.UserError, match=words) as stop:
        msd.partition(8, 2, str(path))
    assert str(path) in str(stop.value) and len(str(stop.value)) < 500 + len(str(tmp_path))


def test_students_of_other_classes_are_no_start(capsys, tmp_path, run):
    """No stage starts from, or stands beside, students that were split otherwise."""
    shutil.copytree(run, tmp_path / "run")
    base = [*SMOKE, "--students", "3", "--partition", "random", "--out", str(tmp_path / "run")]
    line = refused(capsys, msd.main, [*base, "--stages", "adm", "--init", "dm"])
    assert "students3/dm" in line and "same --partition" in line
    shutil.copytree(run / "seed0/students3", tmp_path / "run/seed0/students3-u")
    assert "partition" in refused(capsys, msd.main, [*base, "--tag", "u"])


@pytest.mark.parametrize("label, seeds", [([True, False], [1, 2]), ([0, 8], [1, 2]), ([0.5], [1]), ([0, 1], [1])])
def test_generate_refuses_what_it_cannot_mean(run, label, seeds):
    with pytest.raises((msd.UserError, IndexError)):
        msd.generate(run / "seed0/students3", torch.tensor(label), seeds)
    with pytest.raises((msd.UserError, FileNotFoundError)):
        msd.generate(run, torch.tensor([0]), [1])


def test_partitions_end_to_end(tmp_path, run, capsys):
    """k-means of the teacher's embeddings, and a file: folders of their own, sizes kept, routed as split."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "mine.txt").write_bytes("\ufeff# odd, even\n1 3 5 7\n0, 2, 4, 6\n".encode())
    base = [*SMOKE, "--seeds", "2", "--out", str(tmp_path / "run")]
    assert msd.main([*base, "--students", "3", "--partition", "kmeans"]) == 0
    assert msd.main([*base, "--students", "2", "--partition", str(tmp_path / "mine.txt")]) == 0
    assert load_json(tmp_path / "run/results-kmeans.json")["configs"]["dm"]["partition"] == "kmeans"
    router = msd.Router(load_students(tmp_path / "run/seed0/students2-file-mine").parts)
    assert router(torch.arange(8)).tolist() == [1, 0, 1, 0, 1, 0, 1, 0]
