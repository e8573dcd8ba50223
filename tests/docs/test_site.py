# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The site builds without a warning, and its pages fetch nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from overlay.base import ROOT

FETCHED = re.compile(
    r"<(?:script|img|iframe)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\"' >]+"
    r"|<link\b(?![^>]*\brel=[\"']?canonical)[^>]*\bhref=[\"']?(?:https?:)?//[^\"' >]+"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    run = subprocess.run(
        [*command, "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return folder


def test_each_page_is_there(site):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {path.stem for path in site.glob("*.html")} - {"404"} == pages


def test_nothing_is_fetched(site):
    found = {
        f"{page.name}: {match}"
        for page in site.rglob("*.html")
        for match in FETCHED.findall(page.read_text())
    }
    assert not found


@pytest.mark.parametrize(
    ("html", "is_fetched"),
    [
        ('<script src="https://cdn.example/a.js"></script>', True),
        ("<script src=//cdn.example/a.js></script>", True),
        ('<link rel="stylesheet" href="https://fonts.example/css">', True),
        ('<script src="assets/a.js"></script>', False),
        ('<a href="https://example.org">a link is followed, not fetched</a>', False),
    ],
)
def test_what_counts_as_fetched(html, is_fetched):
    assert bool(FETCHED.search(html)) is is_fetched
