# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The commands that a page tells its readers to type."""

import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["commands"]

_FENCED = re.compile(r"^```(?:bash|console|sh|shell)\n(.*?)^```", re.MULTILINE | re.S)
_INDENTED = re.compile(r"(?:^ {4,}\S.*\n)+", re.MULTILINE)
_ANY_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.S)
_COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:git|make|pip|pre-commit|python|vllm) ")
_COMMENT = re.compile(r"\s{2,}#.*")


def commands(page: Path) -> list[str]:
    """Return the commands in a page's code blocks, without comments, one a line."""
    text = page.read_text()
    blocks = _FENCED.findall(text) + _INDENTED.findall(_ANY_FENCED.sub("", text))
    return [command for block in blocks for command in _of_block(block)]


def _of_block(block: str) -> Iterator[str]:
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
        command = _COMMENT.sub("", line).strip()
        if _COMMAND.match(f"{command} "):
            yield command
