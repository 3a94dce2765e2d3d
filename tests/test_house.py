"""The house's own rules: who imports whom, how large, how wide, what is written where. So that it stays small."""
import ast
import re
import textwrap
from pathlib import Path

import pytest

import msd
import o2mkd
import teacher

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("flags common run toy_mog unet songunet images fid snapshot data edm dmd tsm post adm consistency "
         "students plot evaluate teacher cost msd o2mkd reproduce sample").split()
TEXTS = {p.stem: p.read_text() for p in sorted(ROOT.glob("*.py"))}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
every_module = pytest.mark.parametrize("name", TEXTS)


def size(text: str) -> int:
    return len(text.encode())


def test_every_module_has_its_place():
    assert set(TEXTS) == set(ORDER) and len(ORDER) <= 25
    named = re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) \|", (ROOT / "README.md").read_text(), re.M)
    assert sorted(named) == sorted(ORDER)  # README's table of files


@every_module
def test_imports_go_upwards(name):
    """Only from files above it in ORDER; matplotlib in plot.py alone. The last lines, of `python dmd.py`, may msd."""
    body = [node for node in TREES[name].body if not isinstance(node, ast.If)]
    inside = [node for top in body for node in ast.walk(top)]
    modules = {alias.name for node in inside if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in inside if isinstance(node, ast.ImportFrom)}
    imported = {module.split(".")[0] for module in modules}
    assert not [other for other in imported & set(ORDER) if ORDER.index(other) >= ORDER.index(name)]
    assert name == "plot" or "matplotlib" not in imported


@every_module
def test_a_file_is_small_and_narrow(name):
    wide = [(i + 1, len(line)) for i, line in enumerate(TEXTS[name].splitlines()) if len(line) > 120]
    assert wide == [] and size(TEXTS[name]) <= 0.1 * sum(map(size, TEXTS.values()))


def test_the_whole_is_small():
    """290 000 were wished for, then 315 000 with what was added; missed."""
    assert sum(map(size, TEXTS.values())) <= 332_200


def test_refusals_are_few():
    assert sum(isinstance(node, ast.Raise) for tree in TREES.values() for node in ast.walk(tree)) <= 100


@every_module
def test_no_counterfeit_flags(name):
    assert not re.search(r"getattr\((flags|f)\b|SimpleNamespace", TEXTS[name])


def stored(tree) -> set:
    """(object, attribute) of every `object.attribute = …`."""
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    return {(n.value.id, n.attr) for n in found if isinstance(n.value, ast.Name)}


def test_nothing_is_pasted_on_an_object():
    """What is assigned from outside is declared inside: as a field, or by `self.name = …`. No D.facts = …"""
    declared = {attribute for tree in TREES.values() for owner, attribute in stored(tree) if owner == "self"}
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                fields = [part for part in node.body if isinstance(part, (ast.Assign, ast.AnnAssign))]
                declared |= {n.id for part in fields for n in ast.walk(part) if isinstance(n, ast.Name)}
    for name, tree in TREES.items():
        pasted = {pair for pair in stored(tree) if pair[0] != "self" and pair[1] not in declared}
        assert pasted <= {("flags", "source")}, (name, pasted)
        assert not re.search(r"^\s*(D|G)\.\w+ =", TEXTS[name], re.M), name


@pytest.mark.parametrize("module", [msd, o2mkd, teacher], ids=lambda module: module.__name__)
def test_conflicts_are_sentences_about_flags(module):
    for _, text in module.CONFLICTS:
        assert re.match(r"--[A-Za-z]", text) and not text.endswith(".") and "\n" not in text


@pytest.mark.parametrize("place, most", [
    ("dmd.train", 60), ("adm.train", 70), ("edm.train", 50), ("tsm.train", 50), ("post.train", 50),
    ("consistency.train", 50), ("o2mkd.train", 50), ("msd.main", 40)])
def test_fits_on_a_slide(place, most):
    """Lines of a loop, its docstring included."""
    module, function = place.split(".")
    node, = (n for n in TREES[module].body if isinstance(n, ast.FunctionDef) and n.name == function)
    assert node.end_lineno - node.lineno + 1 <= most


def test_readme_shows_the_loop_as_it_is():
    """The algorithm on one page is dmd.py's generator's turn, letter by letter."""
    text = TEXTS["dmd"]
    begin, last = text.index("        # the generator's turn"), "average.update(step)\n"
    turn = textwrap.dedent(text[begin:text.index(last, begin) + len(last)])
    section = (ROOT / "README.md").read_text().split("## The algorithm on one page")[1]
    assert section.split("```python\n")[1].split("```")[0] == turn


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250 and size(text) <= 20_000
