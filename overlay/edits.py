# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What an edit is: one change to one module of the base, declared as data."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from overlay.base import Base, OverlayError


class EditError(OverlayError):
    """An edit is malformed, or does not fit the base."""


@dataclass(frozen=True)
class Edit:
    """One declared change.

    Attributes:
        source: Name of the file that declares it, and its place there.
        module: Path of the module in the base: `vllm/envs.py`.
        action: What is done at the anchor; see `overlay.rewrite.ACTIONS`.
        why: The reason, in a sentence.
        anchor: Qualified name in the module (`Class.method`); "" is the module itself.
        code: Our own lines, or for `decorate` our own expression.
        to: For `redirect`, the new origin of the name: `package.module:name`.
        bases: PEP 440 specifier of the base versions that need it; "" is all.
    """

    source: str
    module: str
    action: str
    why: str
    anchor: str = ""
    code: str = ""
    to: str = ""
    bases: str = ""

    @property
    def file(self) -> str:
        """Name of the file that declares it."""
        return self.source.partition(",")[0]

    def applies_to(self, base: Base) -> bool:
        """Tell whether this base needs the edit."""
        try:
            return SpecifierSet(self.bases).contains(base.version, prereleases=True)
        except InvalidSpecifier as error:
            raise EditError(f"{self.source}: bases: {error}") from error

    def misfit(self, problem: str, base: Base) -> EditError:
        """Return the error that this edit does not fit a base."""
        return EditError(
            f"{self.module}: {self.action} at {self.anchor or 'the module'!r}: "
            f"{problem} (base {base}, declared in {self.source})"
        )


def load_edits(folder: Path, base: Base) -> tuple[Edit, ...]:
    """Read the edits that a base needs, in order of file name, then of declaration.

    Raises:
        EditError: A file is not TOML, or an edit lacks a key or has an unknown one.
    """
    declared = [edit for file in sorted(folder.glob("*.toml")) for edit in _read(file)]
    return tuple(edit for edit in declared if edit.applies_to(base))


def _read(file: Path) -> list[Edit]:
    try:
        tables = tomllib.loads(file.read_text())["edit"]
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise EditError(f"{file.name}: no list of [[edit]] tables: {error}") from error
    return [
        _edit(f"{file.name}, edit {number}", table)
        for number, table in enumerate(tables, start=1)
    ]


def _edit(source: str, table: dict[str, str]) -> Edit:
    try:
        return Edit(source=source, **table)
    except TypeError as error:
        raise EditError(f"{source}: {error}") from error
