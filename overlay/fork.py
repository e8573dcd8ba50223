# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The fork: what of it differs from its base."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from overlay.base import ROOT, Base
from overlay.edits import Edit, EditError, load_edits
from overlay.rewrite import rewrite

ReadBase = Callable[[str], str | None]
"""Gives the text of a module of the base, or None if the base has no such module."""


@dataclass(frozen=True)
class Fork:
    """A base's fork: files that lie over it and edits of its modules.

    Attributes:
        base: The base that it is made of.
        overlay: Path in the package -> the file in the repository.
        edits: The edits that this base needs.
    """

    base: Base
    overlay: dict[str, Path]
    edits: tuple[Edit, ...]

    @classmethod
    def of(cls, base: Base, root: Path = ROOT) -> "Fork":
        """Collect a base's fork from the repository at `root`."""
        edits = load_edits(root / "overlay" / "edits", base)
        return cls(base, _overlay_files(root), edits)

    def generated(self, read_base: ReadBase) -> dict[str, str]:
        """Return the text of every module that is made here: path -> text.

        Raises:
            EditError: An edit does not fit; see `rewrite`.
        """
        by_module = attrgetter("module")
        modules = {
            path: self._edited(path, list(edits), read_base)
            for path, edits in groupby(sorted(self.edits, key=by_module), by_module)
        }
        return {**modules, "vllm/_version.py": _version_module(self.base.fork_version)}

    def digest(self) -> str:
        """Return what changes when the generated modules or the list of files do."""
        builder = sorted(Path(__file__).parent.glob("*.py"))
        parts = (
            self.base.fork_version,
            self.edits,
            sorted(self.overlay.items()),
            [file.read_text() for file in builder],
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _edited(self, path: str, edits: list[Edit], read_base: ReadBase) -> str:
        if path in self.overlay:
            raise edits[0].misfit("the overlay replaces this module", self.base)
        text = read_base(path)
        if text is None:
            raise edits[0].misfit("the base has no such module", self.base)
        return rewrite(text, edits, self.base)


def _overlay_files(root: Path) -> dict[str, Path]:
    files = {
        file.relative_to(root).as_posix(): file
        for file in sorted((root / "vllm").rglob("*"))
        if file.is_file() and not _is_litter(file)
    }
    if "vllm/__init__.py" in files:
        raise EditError("vllm/__init__.py: the checkout would shadow an installed vLLM")
    return files


def _is_litter(file: Path) -> bool:
    """Tell whether a file is an interpreter's or an editor's, not ours."""
    return "__pycache__" in file.parts or file.name.startswith(".")


def _version_module(version: str) -> str:
    parts = re.split(r"[.+]", version, maxsplit=3)
    fields = tuple(int(part) if part.isdigit() else part for part in parts)
    return (
        "# Written by the fork's builder.\n"
        f"__version__ = version = {version!r}\n"
        f"__version_tuple__ = version_tuple = {fields!r}\n"
        "__commit_id__ = commit_id = None\n"
    )
