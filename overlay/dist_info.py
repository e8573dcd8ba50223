# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The metadata of the fork's distribution: METADATA, WHEEL and RECORD.

Standard library only: the working environment's requirements are read from here before
anything is installed.
"""

import base64
import csv
import hashlib
import io
import re
from dataclasses import dataclass

from overlay.base import Base, Target


def fork_metadata(base_metadata: str, base: Base) -> str:
    """Turn the base's METADATA into the fork's: its name, version and requirements."""
    head, blank, description = base_metadata.partition("\n\n")
    fields = [_fork_field(line, base) for line in head.splitlines()]
    fields += [f"Requires-Dist: {pin}" for pin in base.target.pinned]
    return "\n".join(line for line in fields if line) + blank + description


def requirements(metadata: str) -> list[str]:
    """Return the requirements in a METADATA that no extra asks for."""
    head = metadata.partition("\n\n")[0]
    required = re.findall(r"^Requires-Dist: (.+)$", head, re.MULTILINE)
    return [line for line in required if not re.search(r";.*\bextra\b", line)]


def wheel_file(tag: str) -> str:
    """Return the text of WHEEL, with a compressed tag written out."""
    pythons, abis, platforms = (part.split(".") for part in tag.split("-"))
    tags = [f"{p}-{a}-{m}" for p in pythons for a in abis for m in platforms]
    lines = ["Wheel-Version: 1.0", "Generator: overlay", "Root-Is-Purelib: false"]
    return "\n".join([*lines, *(f"Tag: {tag}" for tag in tags), ""])


@dataclass(frozen=True)
class Row:
    """A file in RECORD; hash and size are empty where the file may change."""

    path: str
    digest: str = ""
    size: str = ""


def hash_field(digest: bytes) -> str:
    """Return a SHA-256 as RECORD spells it."""
    return "sha256=" + base64.urlsafe_b64encode(digest).decode().rstrip("=")


def row_of(path: str, data: bytes) -> Row:
    """Return the row of a file with these contents."""
    return Row(path, hash_field(hashlib.sha256(data).digest()), str(len(data)))


def record_file(rows: list[Row]) -> str:
    """Return the text of RECORD."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows((row.path, row.digest, row.size) for row in rows)
    return text.getvalue()


def read_record(text: str) -> list[Row]:
    """Return the rows of a RECORD."""
    return [Row(*fields) for fields in csv.reader(io.StringIO(text))]


def _fork_field(line: str, base: Base) -> str:
    if line.startswith("Name: "):
        return "Name: vllm"
    if line.startswith("Version: "):
        return f"Version: {base.fork_version}"
    return "" if _is_unneeded(line, base.target) else line


def _is_unneeded(line: str, target: Target) -> bool:
    required = re.match(r"Requires-Dist: ([\w.-]+)", line)
    if required is None:
        return False
    return re.sub(r"[-_.]+", "-", required[1]).lower() in target.unneeded
