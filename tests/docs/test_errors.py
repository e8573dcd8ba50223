# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The page on errors has what the code can say, and nothing else."""

import re
from pathlib import Path

import pytest

from overlay.base import ROOT
from tests.docs.messages import messages
from vllm.v1.engine.replica_calls import DIFFER, NONE
from vllm.v1.engine.weight_fence import REFUSAL

PAGE = ROOT / "docs" / "errors.md"
SOURCES = (
    "distributed/eplb/sync_hold.py",
    "distributed/weight_transfer/*.py",
    "model_executor/model_loader/loaded_scales.py",
    "model_executor/model_loader/reload/*.py",
    "v1/engine/weight_fence.py",
    "v1/worker/reload_source.py",
    "v1/worker/weight_report.py",
    "v1/worker/weight_update_session.py",
)


def raised() -> set[str]:
    """The messages of the modules that the page is about."""
    files = [file for source in SOURCES for file in (ROOT / "vllm").glob(source)]
    return {message for file in files for message in messages(file)}


def explained() -> set[str]:
    """The messages that the page's tables begin their rows with."""
    return set(re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE))


def test_each_message_is_explained():
    assert not raised() - explained()


def test_nothing_else_is_explained():
    assert not explained() - raised()


QUOTED = [REFUSAL.removesuffix(" Reason: {reason}"), DIFFER, NONE]


@pytest.mark.parametrize("quoted", QUOTED)
def test_what_is_filled_in_elsewhere_is_quoted(quoted):
    text = " ".join(PAGE.read_text().split())
    assert re.sub("{.*?}", "…", quoted) in text


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ('raise ValueError("a")', {"a"}),
        ('raise ValueError(f"a {b!r} c")', {"a … c"}),
        ('why = "b"; raise ValueError(f"a {why}")', {"a b"}),
        ('raise self.refuse("a")', {"a"}),
        ('yield Finding(layer, name, "a" + where)', {"a…"}),
        ('self._reload.lost = f"a {b}"', {"a …"}),
        ("raise ValueError(text)", set()),
        ('raise KeyError("a")', set()),
    ],
)
def test_messages_are_read_from_the_source(code, expected, tmp_path: Path):
    file = tmp_path / "module.py"
    file.write_text(f"def f():\n    {code}\n")
    assert messages(file) == expected
