# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Reading declared edits."""

from pathlib import Path

import pytest

from overlay.base import CPU, ROOT, Base
from overlay.edits import EditError, load_edits

NEW, OLD = Base(CPU, "0.32.0"), Base(CPU, "0.22.1")
REQUIRED = 'module = "vllm/a.py"\naction = "at_end"\nwhy = "because"\n'


def declare(folder: Path, name: str, *tables: str) -> None:
    """Write a file of edits."""
    text = "".join(f"[[edit]]\n{REQUIRED}{table}\n" for table in tables)
    (folder / name).write_text(text)


def test_order_is_that_of_files_then_of_declarations(tmp_path):
    declare(tmp_path, "b.toml", 'code = "3"')
    declare(tmp_path, "a.toml", 'code = "1"', 'code = "2"')
    assert [edit.code for edit in load_edits(tmp_path, NEW)] == ["1", "2", "3"]


def test_an_edit_for_other_bases_is_skipped(tmp_path):
    declare(tmp_path, "a.toml", 'bases = ">=0.32"\ncode = "new"', 'code = "all"')
    assert [edit.code for edit in load_edits(tmp_path, NEW)] == ["new", "all"]
    assert [edit.code for edit in load_edits(tmp_path, OLD)] == ["all"]


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ('cod = "x"', "cod"),
        ('bases = "0.32"', "bases"),
        ("code =", "TOML|nvalid"),
    ],
)
def test_a_malformed_edit_names_its_file(tmp_path, table, problem):
    declare(tmp_path, "wrong.toml", table)
    with pytest.raises(EditError, match=problem) as raised:
        load_edits(tmp_path, NEW)
    assert "wrong.toml" in str(raised.value)


def test_a_missing_key_names_the_edit(tmp_path):
    (tmp_path / "short.toml").write_text('[[edit]]\nmodule = "vllm/a.py"\n')
    with pytest.raises(EditError, match=r"short.toml, edit 1.*'action' and 'why'"):
        load_edits(tmp_path, NEW)


@pytest.mark.parametrize("base", [NEW, OLD], ids=str)
def test_the_declared_edits_can_be_read(base):
    assert all(edit.why for edit in load_edits(ROOT / "overlay" / "edits", base))
