# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The series: in which order the fork goes upstream, and what belongs to which patch.

`upstream.toml` declares it. An entry there is a file, or a folder with a slash at its
end; of several entries that cover a file, the longest decides.
"""

import tomllib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from overlay.base import OverlayError
from overlay.fork import Fork, ReadBase
from overlay.links import relink

Tree = dict[str, bytes]
"""Path -> content of the files by which a tree differs from the base's."""

_VERSION = "vllm/_version.py"


class SeriesError(OverlayError):
    """The series is malformed, or does not fit the checkout or the base."""


@dataclass(frozen=True)
class Patch:
    """One commit of the series.

    Attributes:
        title: First line of the commit's message: "[Core] ...".
        body: The rest of the message.
        entries: Files and folders of the checkout that it brings, edits among them.
        moved: Path in the checkout -> path in upstream's tree, where they differ.
    """

    title: str
    body: str
    entries: tuple[str, ...]
    moved: dict[str, str]


@dataclass(frozen=True)
class Series:
    """The patches, in order, and the entries that stay in the fork."""

    patches: tuple[Patch, ...]
    stays: tuple[str, ...]

    @cached_property
    def moved(self) -> dict[str, str]:
        """Path in the checkout -> path in upstream's tree, where they differ."""
        return {a: b for patch in self.patches for a, b in patch.moved.items()}

    def owner(self, path: str) -> Patch | None:
        """Return the patch that brings a file; None is a file that stays.

        Raises:
            SeriesError: No entry covers the file.
        """
        entries: dict[str, Patch | None] = dict.fromkeys(self.stays)
        entries |= {entry: patch for patch in self.patches for entry in patch.entries}
        covering = [entry for entry in entries if covers(entry, path)]
        if not covering:
            raise SeriesError(
                f"{path}: expected in one patch of overlay/upstream.toml, or in its "
                "`stays`, found in neither; add it"
            )
        return entries[max(covering, key=len)]

    def check(self, paths: list[str]) -> None:
        """Check that each file has an owner, and each entry a file.

        Raises:
            SeriesError: One has not.
        """
        for path in paths:
            self.owner(path)
        entries = [*self.stays, *(e for patch in self.patches for e in patch.entries)]
        for entry in entries:
            if not any(covers(entry, path) for path in paths):
                raise SeriesError(f"{entry}: named in the series, but no such file")

    def brought(self, paths: list[str], patch: Patch) -> list[str]:
        """Return those of the paths that a patch brings."""
        return [path for path in paths if self.owner(path) is patch]

    def touched(self, fork: Fork, root: Path) -> set[str]:
        """Return the paths that the series may add to the base or change there."""
        files = {self.moved.get(path, path) for path in checkout_files(root)}
        return files | {edit.module for edit in fork.edits}

    def trees(self, fork: Fork, root: Path, read_base: ReadBase) -> list[Tree]:
        """Return, for each patch, what differs from the base once it is applied.

        Args:
            fork: The whole fork, of the base that the series is for.
            root: The checkout.
            read_base: Gives the text of the base's files, tests and docs included.

        Raises:
            EditError: An edit does not fit the base.
            SeriesError: A file or an entry is left over, or a file outside the package
                would replace one of the base's, where nobody moved it to.
        """
        paths = checkout_files(root)
        self.check(paths)
        trees: list[Tree] = []
        declared: set[str] = set()
        tree: Tree = {}
        for patch in self.patches:
            brought = self.brought(paths, patch)
            declared |= set(brought)
            files = self._files(brought, root, read_base)
            edited = _edited(fork, set(brought), declared, read_base)
            tree = tree | files | edited
            trees.append(tree)
        return trees

    def _files(self, paths: list[str], root: Path, read_base: ReadBase) -> Tree:
        files = {
            self.moved.get(path, path): self._content(path, root)
            for path in paths
            if not path.startswith("overlay/edits/")
        }
        for path in files.keys() - self.moved.values():  # others are placed by hand
            if not path.startswith("vllm/") and read_base(path) is not None:
                raise SeriesError(f"{path}: the base has its own; name it in `stays`")
        return files

    def _content(self, path: str, root: Path) -> bytes:
        content = (root / path).read_bytes()
        if path not in self.moved:
            return content
        return relink(content.decode(), path, self.moved).encode()


def load_series(file: Path) -> Series:
    """Read `upstream.toml`.

    Raises:
        SeriesError: It is not TOML, lacks a key, has an unknown one, or names an entry
            twice.
    """
    try:
        declared = tomllib.loads(file.read_text())
        patches = tuple(_patch(**table) for table in declared["patch"])
        series = Series(patches, tuple(declared["stays"]))
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise SeriesError(f"{file.name}: {error}") from error
    entries = [*series.stays, *(e for patch in patches for e in patch.entries)]
    if twice := sorted({entry for entry in entries if entries.count(entry) > 1}):
        raise SeriesError(f"{file.name}: named more than once: {', '.join(twice)}")
    return series


def covers(entry: str, path: str) -> bool:
    """Tell whether an entry is this file, or a folder that holds it."""
    return path.startswith(entry) if entry.endswith("/") else path == entry


def checkout_files(root: Path) -> list[str]:
    """Return the paths of the files that a patch may bring."""
    scopes = ("vllm", "overlay/edits", "tests", ".buildkite", "examples", "docs")
    return sorted(
        file.relative_to(root).as_posix()
        for scope in scopes
        for file in (root / scope).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
        if not file.name.startswith(".")
    )


def _patch(
    title: str, body: str, files: list[str], moved: dict[str, str] | None = None
) -> Patch:
    return Patch(title, body.strip(), tuple(files), moved or {})


def _edited(
    fork: Fork, brought: set[str], declared: set[str], read_base: ReadBase
) -> Tree:
    """Return the modules that a patch edits; the version stays the base's.

    Args:
        fork: The whole fork.
        brought: Files of this patch.
        declared: Files of this patch and of those before it.
        read_base: Gives the text of the base's modules.
    """
    modules = {e.module for e in fork.edits if f"overlay/edits/{e.file}" in brought}
    edits = (e for e in fork.edits if f"overlay/edits/{e.file}" in declared)
    part = tuple(edit for edit in edits if edit.module in modules)
    texts = replace(fork, overlay={}, edits=part).generated(read_base)
    return {path: text.encode() for path, text in texts.items() if path != _VERSION}
