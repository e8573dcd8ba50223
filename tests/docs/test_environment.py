# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The page on environment variables has all of the fork's, with their defaults."""

import re

import pytest

from overlay.base import ROOT
from vllm import envs
from vllm.envs_reload import VARIABLES

PAGE = ROOT / "docs" / "environment.md"
# What a page calls the defaults that are no text.
SPELLED = {True: "1", False: "0", "": "none"}


def documented() -> dict[str, str]:
    """Return the defaults of the first table, by variable."""
    table = PAGE.read_text().partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \|", table, re.MULTILINE)
    return {variable: default.strip("` ") for variable, default in rows}


def test_each_variable_is_documented():
    assert documented().keys() == VARIABLES.keys()


@pytest.mark.parametrize("variable", VARIABLES)
def test_its_default_is_right(variable, monkeypatch):
    monkeypatch.delenv(variable, raising=False)
    default = VARIABLES[variable]()
    assert documented()[variable] == SPELLED.get(default, default)


def test_vllm_knows_them():
    assert envs.environment_variables.keys() >= VARIABLES.keys()
