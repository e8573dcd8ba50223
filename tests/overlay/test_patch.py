# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Patches for a made-up source, applied to a fresh tree of it."""

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from overlay.patch import write_patches
from overlay.series import SeriesError

SOURCE_FILES = {
    "vllm/cli.py": 'def main():\n    return "base"\n',
    "vllm/kept.py": "KEPT = True\n",
    "vllm/replaced.py": 'NAME = "base"\n',
    "tests/conftest.py": "# upstream's\n",
    "pyproject.toml": '[tool.ruff]\nlint.select = ["I"]\n',
}
SERIES = """
stays = ["tests/overlay/", "docs/"]

[[patch]]
title = "[Core] Add a module"
body = "Nothing uses it yet."
files = ["vllm/new/", "tests/test_added.py"]

[[patch]]
title = "[Core] Answer by the fork"
body = "The made-up reason."
files = ["overlay/edits/cli.toml", "vllm/replaced.py"]

[[patch]]
title = "[Doc] Tell"
body = "What it is."
files = ["docs/added.md"]

[patch.moved]
"docs/added.md" = "docs/training/added.md"
"""
SECOND_EDIT = """
[[edit]]
module = "vllm/cli.py"
action = "at_end"
code = "LATE = True"
why = "A made-up reason."
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A made-up source distribution."""
    path = tmp_path / "vllm-0.33.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in SOURCE_FILES.items():
            member = tarfile.TarInfo(f"vllm-0.33.0/{name}")
            member.size = len(text)
            member.mode = 0o755
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def repository(checkout):
    """A checkout with tests, docs and a series."""
    checkout.write("tests/test_added.py", "from vllm.new import added\n")
    checkout.write("tests/overlay/test_builder.py", "")
    checkout.write("docs/added.md", "# Added to [the fork](fork.md)\n")
    checkout.write("docs/fork.md", "# The fork\n")
    checkout.write("overlay/upstream.toml", SERIES)
    return checkout


@pytest.fixture
def fresh(source, tmp_path: Path) -> Path:
    """A repository that holds the source, as somebody who applies the series has it."""
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "vllm-0.33.0"
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message=base")
    return folder


def git(folder: Path, *arguments: str) -> str:
    """Run git as somebody who is known to it."""
    sender = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.com"]
    command = ["git", *sender, *arguments]
    run = subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    )
    return run.stdout


def apply(folder: Path, patches: Path) -> list[str]:
    """Apply a series and return the subjects of its commits, oldest first."""
    files = [str(file) for file in sorted(patches.glob("*.patch"))]
    git(folder, "am", "--keep-non-patch", *files)
    return git(folder, "log", "--reverse", "--format=%s").splitlines()[1:]


def test_git_am_takes_the_series(source, repository, fresh, tmp_path):
    write_patches(source, "0.33.0", tmp_path / "out", repository.root)
    assert apply(fresh, tmp_path / "out") == [
        "[Core] Add a module",
        "[Core] Answer by the fork",
        "[Doc] Tell",
    ]
    tracked = git(fresh, "ls-files").splitlines()
    assert {path: (fresh / path).read_text() for path in tracked} == {
        **SOURCE_FILES,
        "docs/training/added.md": "# Added to the fork\n",
        "tests/test_added.py": "from vllm.new import added\n",
        "vllm/cli.py": 'def main():\n    return "fork"\n    return "base"\n',
        "vllm/new/added.py": "ADDED = 1\n",
        "vllm/replaced.py": 'NAME = "fork"\n',
    }


def test_a_patch_holds_its_own_alone(source, repository, fresh, tmp_path):
    write_patches(source, "0.33.0", tmp_path / "out", repository.root)
    apply(fresh, tmp_path / "out")
    changed = git(fresh, "show", "--name-only", "--format=%b", "HEAD~1").splitlines()
    assert changed[0] == "The made-up reason."
    assert changed[-2:] == ["vllm/cli.py", "vllm/replaced.py"]


def test_edits_of_one_module_in_two_patches(source, repository, fresh, tmp_path):
    repository.write("overlay/edits/a_late.toml", SECOND_EDIT)
    late = SERIES.replace(
        '"docs/added.md"]', '"docs/added.md", "overlay/edits/a_late.toml"]'
    )
    repository.write("overlay/upstream.toml", late)
    write_patches(source, "0.33.0", tmp_path / "out", repository.root)
    apply(fresh, tmp_path / "out")
    assert "LATE" not in git(fresh, "show", "HEAD~1:vllm/cli.py")
    last = (fresh / "vllm/cli.py").read_text()
    assert 'return "fork"' in last and last.endswith("LATE = True\n")


def test_what_edits_leave_untidy_is_tidied(source, repository, fresh, tmp_path):
    untidy = "from b import b\\nfrom a import a"
    edit = SECOND_EDIT.replace("at_end", "after_import").replace("LATE = True", untidy)
    repository.write("overlay/edits/cli.toml", edit)
    write_patches(source, "0.33.0", tmp_path / "out", repository.root)
    apply(fresh, tmp_path / "out")
    text = (fresh / "vllm/cli.py").read_text()
    assert text.startswith("from a import a\nfrom b import b\n\n\ndef main():")


def test_a_module_keeps_its_mode(source, repository, fresh, tmp_path):
    write_patches(source, "0.33.0", tmp_path / "out", repository.root)
    apply(fresh, tmp_path / "out")
    assert git(fresh, "diff", "--summary", "HEAD~3", "--", "vllm/cli.py") == ""


def test_earlier_patches_are_replaced(source, repository, tmp_path):
    left = tmp_path / "out" / "0009-left.patch"
    left.parent.mkdir()
    left.write_text("of an earlier series")
    write_patches(source, "0.33.0", left.parent, repository.root)
    assert not left.exists() and len(list(left.parent.iterdir())) == 3


def test_a_file_outside_the_package_replaces_nothing(source, repository, tmp_path):
    repository.write("tests/conftest.py", "# ours\n")
    ours = SERIES.replace(
        '"tests/test_added.py"', '"tests/test_added.py", "tests/conftest.py"'
    )
    repository.write("overlay/upstream.toml", ours)
    with pytest.raises(SeriesError, match=r"^tests/conftest\.py: the base has its own"):
        write_patches(source, "0.33.0", tmp_path / "out", repository.root)


def test_a_file_that_is_moved_there_replaces_one(source, repository, fresh, tmp_path):
    moved = SERIES.replace("docs/training/added.md", "tests/conftest.py")
    repository.write("overlay/upstream.toml", moved)
    write_patches(source, "0.33.0", tmp_path / "out", repository.root)
    apply(fresh, tmp_path / "out")
    assert (fresh / "tests/conftest.py").read_text() == "# Added to the fork\n"


def test_a_patch_that_changes_nothing_is_refused(source, repository, tmp_path):
    repository.write("vllm/new/added.py", "")
    repository.write("vllm/kept.py", SOURCE_FILES["vllm/kept.py"])
    idle = '[[patch]]\ntitle = "[Core] Idle"\nbody = ""\nfiles = ["vllm/kept.py"]\n'
    repository.write("overlay/upstream.toml", f"{SERIES}\n{idle}")
    with pytest.raises(SeriesError, match=r"^\[Core\] Idle: .*changes nothing"):
        write_patches(source, "0.33.0", tmp_path / "out", repository.root)
