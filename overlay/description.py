# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the pull request says: a text, and the tables that the pages have already."""

import re
from pathlib import Path

from overlay.series import Series, SeriesError

__all__ = ["describe", "table"]

TEXT = Path(__file__).with_name("description.md")

# Table -> its page, the heading that it is under, and which of those tables it is.
TABLES = {
    "defects": ("README.md", "What it shows", 0),
    "sync": ("docs/sync-speed.md", "Measured", 0),
    "device": ("docs/sync-speed.md", "Measured", 1),
    "kernels": ("docs/fp8-moe.md", "Measured", 0),
}

_TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)


def describe(series: Series, root: Path) -> str:
    """Return the description of the pull request for a series.

    Raises:
        SeriesError: A page lacks a table that belongs in it.
    """
    titles = [f"{n}. {patch.title}" for n, patch in enumerate(series.patches, start=1)]
    found = {
        name: table(root / page, heading, index)
        for name, (page, heading, index) in TABLES.items()
    }
    return TEXT.read_text().format(patches="\n".join(titles), **found)


def table(page: Path, heading: str, index: int) -> str:
    """Return a table of a page, by its place under a heading of the second level.

    Raises:
        SeriesError: There is none.
    """
    _, _, below = page.read_text().partition(f"\n## {heading}\n")
    tables = _TABLE.findall(below.partition("\n## ")[0])
    if index >= len(tables):
        raise SeriesError(
            f"{page.name}: expected {index + 1} tables under {heading!r}, found "
            f"{len(tables)}; correct TABLES in overlay/description.py"
        )
    return tables[index].rstrip()
