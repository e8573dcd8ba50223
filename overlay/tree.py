# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Laying the fork into a folder in which a base lies unpacked.

What the fork replaces is kept beside the package, so that laying again starts from the
base's own modules, and what the fork no longer replaces comes back.
"""

import filecmp
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

from overlay.base import dist_infos
from overlay.dist_info import Row, fork_metadata, read_record, record_file
from overlay.fork import Fork


class Placement(Protocol):
    """How a file of the checkout gets into the tree."""

    def put(self, source: Path, target: Path) -> None:
        """Place `source` at `target`, which does not exist."""

    def holds(self, source: Path, target: Path) -> bool:
        """Tell whether `target` is what `put` would make of it."""


class Link:
    """A symbolic link: a change in the checkout takes effect at once."""

    def put(self, source: Path, target: Path) -> None:
        target.symlink_to(source)

    def holds(self, source: Path, target: Path) -> bool:
        return target.is_symlink() and target.readlink() == source


class Copy:
    """A copy: the tree does not need the checkout any more."""

    def put(self, source: Path, target: Path) -> None:
        shutil.copyfile(source, target)

    def holds(self, source: Path, target: Path) -> bool:
        is_copy = target.is_file() and not target.is_symlink()
        return is_copy and filecmp.cmp(source, target, shallow=False)


@dataclass(frozen=True)
class Stamp:
    """What was last laid into a tree.

    Attributes:
        digest: `Fork.digest` of it; "" while laying is under way.
        placed: Paths of the files that came from the checkout.
        generated: Path -> SHA-256 of the modules that were generated.
    """

    digest: str = ""
    placed: list[str] = field(default_factory=list)
    generated: dict[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> set[str]:
        """Every path that is not the base's own."""
        return {*self.placed, *self.generated}


class Tree:
    """A folder with a `vllm` package in it: site-packages, or an unpacked wheel."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.memory = root / ".vllm-overlay"
        self._originals = self.memory / "originals"
        self._stamp_file = self.memory / "stamp.json"

    def lay(self, fork: Fork, placement: Placement) -> bool:
        """Lay a fork and return whether anything had to be done.

        Raises:
            EditError: An edit does not fit; the tree is as it was before.
        """
        if self._is_fresh(fork, placement):
            return False
        generated = fork.generated(self.read_base)
        before = self._read_stamp()
        after = Stamp(fork.digest(), list(fork.overlay), _hashes(generated))
        self._keep_originals(after.paths - before.paths)
        # Should this be cut short, the next run must know what is not the base's.
        touched = sorted(before.paths | after.paths)
        self._write_stamp(Stamp(placed=touched))
        for path, source in fork.overlay.items():
            self._place(path, source, placement)
        for path, text in generated.items():
            self._write(path, text)
        for path in before.paths - after.paths:
            self._restore(path)
        self._rewrite_dist_info(fork, before.paths | after.paths)
        self._write_stamp(after)
        return True

    def read_base(self, path: str) -> str | None:
        """Return the base's own text of a module, or None if it has no such module."""
        original = self._originals / path
        if original.is_file():
            return original.read_text()
        is_added = path in self._read_stamp().paths
        file = self.root / path
        return None if is_added or not file.is_file() else file.read_text()

    def _is_fresh(self, fork: Fork, placement: Placement) -> bool:
        stamp = self._read_stamp()
        if stamp.digest != fork.digest():
            return False
        placed, generated = fork.overlay.items(), stamp.generated.items()
        return all(
            placement.holds(source, self.root / path) for path, source in placed
        ) and all(_file_hash(self.root / path) == digest for path, digest in generated)

    def _keep_originals(self, paths: set[str]) -> None:
        for path in paths:
            if (self.root / path).is_file():
                original = self._originals / path
                original.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.root / path, original)

    def _restore(self, path: str) -> None:
        original, target = self._originals / path, self.root / path
        if original.is_file():
            # Copied, not moved: the next run needs it, should this one be cut short.
            aside = _beside(target)
            shutil.copy2(original, aside)
            os.replace(aside, target)
        else:
            target.unlink(missing_ok=True)

    def _place(self, path: str, source: Path, placement: Placement) -> None:
        target = self.root / path
        if not placement.holds(source, target):
            aside = _beside(target)
            placement.put(source, aside)
            os.replace(aside, target)

    def _write(self, path: str, text: str) -> None:
        target = self.root / path
        # Renamed into place: the target may be a hard link, or be read right now.
        aside = _beside(target)
        aside.write_text(text)
        os.replace(aside, target)

    def _rewrite_dist_info(self, fork: Fork, touched: set[str]) -> None:
        for folder in dist_infos(self.root):
            named = f"vllm-{fork.base.fork_version}.dist-info"
            os.rename(folder, self.root / named)
            metadata = (self.root / named / "METADATA").read_text()
            self._write(f"{named}/METADATA", fork_metadata(metadata, fork.base))
            self._rewrite_record(folder.name, named, touched)

    def _rewrite_record(self, old: str, new: str, touched: set[str]) -> None:
        record = self.root / new / "RECORD"
        rows = [
            replace(row, path=row.path.replace(f"{old}/", f"{new}/", 1))
            for row in read_record(record.read_text())
            if row.path not in touched
        ]
        present = [path for path in sorted(touched) if (self.root / path).exists()]
        rows += [Row(path) for path in present]
        self._write(f"{new}/RECORD", record_file(rows))

    def _read_stamp(self) -> Stamp:
        if not self._stamp_file.is_file():
            return Stamp()
        return Stamp(**json.loads(self._stamp_file.read_text()))

    def _write_stamp(self, stamp: Stamp) -> None:
        self.memory.mkdir(exist_ok=True)
        self._stamp_file.write_text(json.dumps(asdict(stamp), indent=1))


def _beside(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.new")
    aside.unlink(missing_ok=True)
    return aside


def _hashes(texts: dict[str, str]) -> dict[str, str]:
    return {p: hashlib.sha256(text.encode()).hexdigest() for p, text in texts.items()}


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
