"""Partitions: disjoint, covering, deterministic; k-means does not see the order of the classes; the router agrees with them."""
import pytest
import torch

import common
import msd
import toy_mog
from conftest import refused

SMOKE = ["--preset", "smoke", "--quiet"]


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
@pytest.mark.parametrize("classes, students", [(8, 1), (8, 3), (8, 8), (16, 4), (100, 7)])
def test_disjoint_covering_and_deterministic(how, classes, students):
    E = torch.randn(classes, 5, generator=torch.Generator().manual_seed(1))
    parts = msd.partition(classes, students, how, E, seed=3)
    assert len(parts) == students and torch.cat(parts).sort().values.tolist() == list(range(classes))
    assert all(len(p) and (p.diff() > 0).all() for p in parts)
    assert all(torch.equal(a, b) for a, b in zip(parts, msd.partition(classes, students, how, E, seed=3)))
    if how != "kmeans":
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if how == "random" and students == 4:
        assert as_sets(parts) != as_sets(msd.partition(classes, students, how, E, seed=4))


def test_kmeans_finds_the_clusters_whatever_the_order():
    E, k = blobs()
    truth = {frozenset((k == i).nonzero()[:, 0].tolist()) for i in range(4)}
    assert as_sets(msd.partition(16, 4, "kmeans", E)) == truth
    noise = torch.randn(40, 8, generator=torch.Generator().manual_seed(5))                      # no clusters at all: still the same split
    first = as_sets(msd.partition(40, 5, "kmeans", noise, seed=2))
    for s in range(5):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(s))
        again = msd.partition(40, 5, "kmeans", noise[order], seed=2)
        assert {frozenset(order[p].tolist()) for p in again} == first


def test_an_empty_cluster_starts_again_and_says_so(capsys):
    E = torch.zeros(6, 3)
    E[3:] = 1.0                                                     # two different conditions, four clusters
    parts = msd.partition(6, 4, "kmeans", E)
    assert len(parts) == 4 and all(map(len, parts)) and torch.cat(parts).sort().values.tolist() == list(range(6))
    assert "ran empty" in capsys.readouterr().out


def test_quadrants():
    angle = torch.tensor([0.3, 1.2, 2.0, 3.0, 3.5, 4.5, 5.0, 6.0])
    E = torch.cat([torch.stack([angle.cos(), angle.sin()], -1), torch.randn(8, 3)], 1)
    assert [p.tolist() for p in msd.partition(8, 4, "quadrant", E)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(common.UserError, match="--students 4"):
        msd.partition(8, 3, "quadrant", E)
    with pytest.raises(common.UserError, match="empty"):
        msd.partition(8, 4, "quadrant", E.abs())


def test_the_router_of_embeddings_agrees_with_the_partition():
    E, _ = blobs()
    for how, table in (("kmeans", E), ("quadrant", toy_mog.prompts())):
        parts = msd.partition(len(table), 4, how, table)
        router = msd.Router(parts, embeddings=table)
        assert router.quadrants == (how == "quadrant")
        label = torch.arange(len(table))
        assert torch.equal(router.unseen(table), router(label))
        assert torch.equal(router.unseen(table + 0.01 * (torch.rand(table.shape) - 0.5)), router(label))                        # nearly a known one
        assert router.unseen(table[:6].reshape(2, 3, -1)).shape == (2, 3)
    parts = msd.partition(16, 4, "random", E)                       # a known embedding has a student, whatever its neighbours'
    assert torch.equal(msd.Router(parts, embeddings=E).unseen(E), msd.Router(parts)(torch.arange(16)))
    with pytest.raises(common.UserError):
        msd.Router(msd.partition(8, 2)).unseen(torch.zeros(1, 2))


def test_distances_within_and_between():
    E = torch.tensor([[0.0, 0], [1, 0], [10, 0], [13, 0]])
    within, between = msd.distances([torch.tensor([0, 1]), torch.tensor([2, 3])], E)
    assert within == pytest.approx(2.0) and between == pytest.approx((10 + 13 + 9 + 12) / 4)
    within, _ = msd.distances(list(torch.arange(4)[:, None]), E)
    assert within != within                                         # one condition each: nothing within


@pytest.mark.parametrize("text, words", [
    ("0 1 2 3\n4 5 6\n", ["class 7 is missing"]),
    ("0 1 2 3\n3 4 5 6 7\n", ["class 3 is listed twice"]),
    ("0 1 2 3\n4 5 6 7 8\n", ["class 8", "0 to 7"]),
    ("0 1 2 three\n4 5 6 7\n", ["three", "one line of classes per student"]),
    ("0 1 2\n3 4\n5 6 7\n", ["3 students", "--students 2"]),
])
def test_a_bad_partition_file(capsys, tmp_path, text, words):
    (tmp_path / "mine.txt").write_text(text)
    line = refused(capsys, msd.main, [*SMOKE, "--students", "2", "--partition", str(tmp_path / "mine.txt"), "--out", str(tmp_path / "x")])
    assert "mine.txt" in line and all(w in line for w in words)
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("argv, words", [
    (["--partition", "kmean"], ["did you mean kmeans?"]),
    (["--partition", "quadrant", "--students", "2"], ["--students 4"]),
    (["--partition", "random", "--students", "9"], ["--students 9", "1 to 8"]),
    (["--partition", "kmeans", "--students", "9"], ["--students 9", "1 to 8"]),
    (["--method", "cd", "--stages", "dm,adm"], ["--method cd", "--stages dm,adm"]),
    (["--method", "cm"], ["did you mean cd?"]),
    (["--method", "cd", "--cd-target", "1"], ["--cd-target 1.0"]),
    (["--method", "cd", "--cd-distance", "lpips"], ["--cd-distance lpips"]),
    (["--method", "cd", "--cd-points", "1"], ["--cd-points 1"]),
    (["--partition", "random", "--classes", "3"], ["--partition"]),
])
def test_refused(capsys, tmp_path, argv, words):
    line = refused(capsys, msd.main, [*SMOKE, *argv, "--out", str(tmp_path / "x")])
    assert all(w in line for w in words), line
    assert not list(tmp_path.rglob("*.pt"))


def test_files_that_are_no_text(capsys, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(bytes([255, 254, 0, 1, 200]))
    (tmp_path / "long").write_text("9" * 5000)
    (tmp_path / "bom").write_bytes("\ufeff0 1 2 3\n4 5 6 7\n".encode())
    for name, words in (("folder", "a folder"), ("binary", "not a text file"), ("long", "not a class number"), ("nowhere", "no such file")):
        line = refused(capsys, msd.main, [*SMOKE, "--students", "2", "--partition", str(tmp_path / name), "--out", str(tmp_path / "x")])
        assert words in line and len(line) < 300 + len(str(tmp_path))
    assert [p.tolist() for p in msd.partition(8, 2, str(tmp_path / "bom"))] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_students_of_other_classes_or_another_method_are_refused(capsys, tmp_path, run):
    """No stage starts from, or stands beside, students that were split or trained otherwise."""
    import shutil
    out = tmp_path / "run"
    shutil.copytree(run, out)
    base = [*SMOKE, "--students", "3", "--out", str(out)]
    line = refused(capsys, msd.main, [*base, "--stages", "adm", "--init", "dm", "--partition", "random"])
    assert "students3/dm" in line and "same --partition" in line
    (out / "seed0/students3-t/dm").mkdir(parents=True)
    assert "another method (dm)" in refused(capsys, msd.main, [*base, "--method", "cd", "--tag", "t"])
    shutil.copytree(out / "seed0/students3", out / "seed0/students3-u")
    assert "another --partition" in refused(capsys, msd.main, [*base, "--stages", "adm", "--init", "random", "--partition", "random", "--tag", "u"])
    for argv in (["--method", "cd", "--steps", "5"], ["--method", "cd", "--bug", "a"], ["--stages", "adm", "--bug", "b"]):
        assert argv[-2] in refused(capsys, msd.main, [*base, *argv])


@pytest.mark.parametrize("label, seeds", [([True, False], [1, 2]), (3, [1]), ([0, 1], 5), ([], []), ([[1, 2]], [1]), (["3"], [1]), ([1, 2], [1.5, 2]),
                                          ([0.5, 0.5], [1, 2]), ([0, 1], [1])])
def test_generate_refuses_what_it_cannot_mean(run, label, seeds):
    with pytest.raises(common.UserError, match="generate"):
        msd.generate(run / "seed0/students3", label, seeds)
    with pytest.raises(common.UserError, match="students8"):
        msd.generate(run, [0], [1])


def test_partitions_end_to_end(tmp_path, run, capsys):
    """k-means of the teacher's embeddings and a file: folders of their own, sizes and distances printed and kept, routed as split."""
    import json
    import shutil
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "mine.txt").write_text("# odd, even\n1 3 5 7\n0, 2, 4, 6\n")
    base = [*SMOKE, "--seeds", "2", "--out", str(tmp_path / "run")]
    assert msd.main([*base, "--students", "3", "--partition", "kmeans"]) == 0
    assert msd.main([*base, "--students", "2", "--partition", str(tmp_path / "mine.txt")]) == 0
    text = capsys.readouterr().out
    assert "seed 1, kmeans" in text and "within students" in text
    results = json.loads((tmp_path / "run/results-kmeans.json").read_text())
    split = results["partition"]["3"]
    assert sum(split["sizes"][0]) == 8 and len(split["within"]) == 2 and split["how"] == "kmeans"
    router = msd.load_students(tmp_path / "run/seed0/students2-file-mine").router
    assert router(torch.arange(8)).tolist() == [1, 0, 1, 0, 1, 0, 1, 0]
