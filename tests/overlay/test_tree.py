# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Laying the fork into an unpacked base, again and again."""

import os
from pathlib import Path

import pytest

from overlay.dist_info import read_record
from overlay.edits import EditError
from overlay.tree import Copy, Link, Tree
from tests.overlay.conftest import BASE_FILES, unpack

DIST_INFO = "vllm-0.32.0+cpu.reload.1.0.0.dist-info"


@pytest.fixture
def tree(wheel, tmp_path) -> Tree:
    """The made-up base, unpacked."""
    return Tree(unpack(wheel, tmp_path / "unpacked"))


@pytest.fixture(params=[Copy(), Link()], ids=["copy", "link"])
def placement(request):
    """Both ways in which a file gets into a tree."""
    return request.param


def contents(tree: Tree) -> dict[str, str]:
    """Return every file of the package: path -> text."""
    files = (path for path in (tree.root / "vllm").rglob("*") if path.is_file())
    return {str(path.relative_to(tree.root)): path.read_text() for path in files}


def test_the_fork_lies_over_the_base(tree, wheel, checkout, placement):
    assert tree.lay(checkout.fork(wheel), placement)
    laid = contents(tree)
    assert laid["vllm/replaced.py"] == "NAME = 'fork'\n"
    assert laid["vllm/new/added.py"] == "ADDED = 1\n"
    assert laid["vllm/cli.py"].startswith("def main():\n    return 'fork'\n")
    assert laid["vllm/kept.py"] == BASE_FILES["vllm/kept.py"]


def test_laying_again_does_nothing(tree, wheel, checkout, placement):
    tree.lay(checkout.fork(wheel), placement)
    laid = contents(tree)
    assert not tree.lay(checkout.fork(wheel), placement)
    assert contents(tree) == laid


def test_an_edit_is_applied_to_the_base_not_to_itself(tree, wheel, checkout, placement):
    tree.lay(checkout.fork(wheel), placement)
    declared = (checkout.root / "overlay/edits/cli.toml").read_text()
    checkout.write("overlay/edits/cli.toml", declared.replace("'fork'", "'again'"))
    assert tree.lay(checkout.fork(wheel), placement)
    assert contents(tree)["vllm/cli.py"].count("return") == 2


def test_what_vanishes_from_the_fork_is_the_bases_again(
    tree, wheel, checkout, placement
):
    tree.lay(checkout.fork(wheel), placement)
    for path in ("vllm/replaced.py", "vllm/new/added.py", "overlay/edits/cli.toml"):
        (checkout.root / path).unlink()
    assert tree.lay(checkout.fork(wheel), placement)
    laid = contents(tree)
    version = laid.pop("vllm/_version.py")
    assert "cpu.reload" in version
    base = {path: BASE_FILES[path] for path in laid}
    assert laid == base
    assert "vllm/cli.py" in laid and "vllm/replaced.py" in laid


def test_a_file_new_in_the_fork_is_laid(tree, wheel, checkout, placement):
    tree.lay(checkout.fork(wheel), placement)
    checkout.write("vllm/kept.py", "KEPT = False\n")
    assert tree.lay(checkout.fork(wheel), placement)
    assert contents(tree)["vllm/kept.py"] == "KEPT = False\n"


@pytest.mark.parametrize("path", ["vllm/cli.py", "vllm/replaced.py"])
def test_what_somebody_overwrote_is_laid_again(tree, wheel, checkout, path):
    tree.lay(checkout.fork(wheel), Copy())
    laid = contents(tree)
    (tree.root / path).write_text("broken")
    assert tree.lay(checkout.fork(wheel), Copy())
    assert contents(tree) == laid


def test_a_change_in_the_checkout_needs_no_laying_when_linked(tree, wheel, checkout):
    tree.lay(checkout.fork(wheel), Link())
    checkout.write("vllm/replaced.py", "NAME = 'newer'\n")
    assert contents(tree)["vllm/replaced.py"] == "NAME = 'newer'\n"
    assert not tree.lay(checkout.fork(wheel), Link())


def test_a_change_in_the_checkout_is_copied_when_copied(tree, wheel, checkout):
    tree.lay(checkout.fork(wheel), Copy())
    checkout.write("vllm/replaced.py", "NAME = 'newer'\n")
    assert tree.lay(checkout.fork(wheel), Copy())
    assert contents(tree)["vllm/replaced.py"] == "NAME = 'newer'\n"


def test_a_misfit_leaves_the_tree_as_it_was(tree, wheel, checkout, placement):
    before = contents(tree)
    declared = (checkout.root / "overlay/edits/cli.toml").read_text()
    checkout.write("overlay/edits/cli.toml", declared.replace('"main"', '"absent"'))
    with pytest.raises(EditError, match="absent"):
        tree.lay(checkout.fork(wheel), placement)
    assert contents(tree) == before


def test_laying_that_was_cut_short_is_done_again(
    tree, wheel, checkout, placement, monkeypatch
):
    fork = checkout.fork(wheel)
    with monkeypatch.context() as patch:
        patch.setattr(Tree, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tree.lay(fork, placement)
    assert tree.lay(fork, placement)
    assert contents(tree)["vllm/cli.py"].startswith("def main():\n    return 'fork'\n")
    for path in ("vllm/replaced.py", "vllm/new/added.py"):
        (checkout.root / path).unlink()
    tree.lay(checkout.fork(wheel), placement)
    assert contents(tree)["vllm/replaced.py"] == BASE_FILES["vllm/replaced.py"]
    assert "vllm/new/added.py" not in contents(tree)


def test_restoring_that_was_cut_short_is_done_again(
    tree, wheel, checkout, placement, monkeypatch
):
    tree.lay(checkout.fork(wheel), placement)
    (checkout.root / "vllm/replaced.py").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Tree, "_rewrite_dist_info", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tree.lay(checkout.fork(wheel), placement)
    assert tree.lay(checkout.fork(wheel), placement)
    assert contents(tree)["vllm/replaced.py"] == BASE_FILES["vllm/replaced.py"]


def interrupted(*arguments: object) -> None:
    """Stand in for a step during which somebody pressed Ctrl-C."""
    raise KeyboardInterrupt


def test_a_hard_linked_twin_is_not_written_through(tree, wheel, checkout, placement):
    twins = tree.root.with_name("twins")
    for path in tree.root.rglob("*.py"):
        twin = twins / path.relative_to(tree.root)
        twin.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, twin)
    tree.lay(checkout.fork(wheel), placement)
    for path in twins.rglob("*.py"):
        assert path.read_text() == BASE_FILES[str(path.relative_to(twins))]


def test_the_distribution_is_the_forks(tree, wheel, checkout, placement):
    tree.lay(checkout.fork(wheel), placement)
    assert [path.name for path in tree.root.glob("*.dist-info")] == [DIST_INFO]
    folder = tree.root / DIST_INFO
    assert (
        "\nName: vllm\nVersion: 0.32.0+cpu.reload.1.0.0\n"
        in (folder / "METADATA").read_text()
    )
    assert record(folder) == {
        str(path.relative_to(tree.root))
        for path in tree.root.rglob("*")
        if path.is_file() and tree.memory not in path.parents
    }


def record(dist_info: Path) -> set[str]:
    """Return the paths in a RECORD, checked to be there only once."""
    paths = [row.path for row in read_record((dist_info / "RECORD").read_text())]
    assert len(paths) == len(set(paths))
    return set(paths)


def test_record_follows_a_vanished_file(tree, wheel, checkout, placement):
    tree.lay(checkout.fork(wheel), placement)
    (checkout.root / "vllm/new/added.py").unlink()
    (checkout.root / "vllm/replaced.py").unlink()
    tree.lay(checkout.fork(wheel), placement)
    paths = record(tree.root / DIST_INFO)
    assert "vllm/new/added.py" not in paths
    assert "vllm/replaced.py" in paths
