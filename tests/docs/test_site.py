# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The site builds without a warning, and its pages fetch nothing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from overlay.base import ROOT

FETCHED = re.compile(
    r"<(?:script|img|iframe)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\"' >]+"
    r"|<link\b(?![^>]*\brel=[\"']?canonical)[^>]*\bhref=[\"']?(?:https?:)?//[^\"' >]+"
)


LINK = re.compile(r"\]\(([^)#:]+)\)")


def build(folder: Path, root: Path = ROOT) -> subprocess.CompletedProcess:
    """Build the site of a checkout into a folder, as `make docs` does."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(
        [*command, "--site-dir", str(folder)],
        cwd=root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    run = build(folder)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.parametrize(
    ("page", "text", "complaint"),
    [
        ("new.md", "# Found by nobody", 'not included in the "nav"'),
        ("index.md", "[a page](gone.md)", "gone.md"),
        ("index.md", "[a part](limits.md#gone)", "gone"),
    ],
    ids=["in no menu", "a link to no page", "a link to no heading"],
)
def test_a_fault_is_refused(tmp_path, page, text, complaint):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "docs" / page).write_text(text)
    run = build(tmp_path / "site", tmp_path)
    assert run.returncode and complaint in run.stderr


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md"])
def test_links_of_a_page_beside_the_site_lead_somewhere(page):
    links = LINK.findall((ROOT / page).read_text())
    assert links and all((ROOT / link).is_file() for link in links)


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
