# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The description of the pull request, with the tables of the pages."""

import re

import pytest

from overlay.base import ROOT
from overlay.description import describe, table
from overlay.series import SeriesError, load_series

PAGE = """# A page

## First

| a |
|---|
| 1 |

Text.

| b |
|---|

## Second

| c |
"""


@pytest.fixture
def page(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(PAGE)
    return file


@pytest.mark.parametrize(
    ("heading", "index", "expected"),
    [
        ("First", 0, "| a |\n|---|\n| 1 |"),
        ("First", 1, "| b |\n|---|"),
        ("Second", 0, "| c |"),
    ],
)
def test_a_table_is_found_under_its_heading(page, heading, index, expected):
    assert table(page, heading, index) == expected


@pytest.mark.parametrize(("heading", "index"), [("Second", 1), ("Third", 0)])
def test_a_table_that_is_gone_is_named(page, heading, index):
    with pytest.raises(SeriesError, match=rf"^page\.md: .*'{heading}'"):
        table(page, heading, index)


def test_each_patch_and_table_is_in_the_description():
    series = load_series(ROOT / "overlay" / "upstream.toml")
    text = describe(series, ROOT)
    assert all(patch.title in text for patch in series.patches)
    assert "scales never sent" in text and "Qwen3-30B-A3B" in text
    assert "{" not in text


def test_its_tests_are_those_of_the_series():
    text = describe(load_series(ROOT / "overlay" / "upstream.toml"), ROOT)
    paths = re.findall(r"\btests/[\w/.]+", text)
    assert paths and all((ROOT / path).exists() for path in paths)
