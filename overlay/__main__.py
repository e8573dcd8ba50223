# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The command line: `python -m overlay build | develop | lay | patch | venv`."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}")

from overlay.base import CUDA, ROOT, OverlayError, find_wheel, identify_folder

# What needs more than the standard library is imported by the command that uses it:
# `venv` runs before anything is installed.


def build(options: argparse.Namespace) -> None:
    """Write the fork's wheel."""
    from overlay.fork import Fork
    from overlay.wheel import build_wheel

    wheel = find_wheel(options.base)
    print(build_wheel(wheel, Fork.of(wheel.base), options.out))


def develop(options: argparse.Namespace) -> None:
    """Make an existing environment follow this checkout."""
    from overlay.develop import develop
    from overlay.fork import Fork

    wheel = find_wheel(options.base)
    fork = Fork.of(wheel.base)
    changed = develop(options.venv, wheel, fork)
    state = "now has" if changed else "already has"
    print(f"{options.venv.name} {state} vllm {fork.base.fork_version}")


def lay(options: argparse.Namespace) -> None:
    """Lay the fork into a folder in which a base lies unpacked."""
    from overlay.fork import Fork
    from overlay.tree import Copy, Tree

    base = identify_folder(options.folder)
    if options.base:
        base = replace(base, version=options.base)
    Tree(options.folder).lay(Fork.of(base), Copy())
    print(f"{options.folder} has vllm {base.fork_version}")


def patch(options: argparse.Namespace) -> None:
    """Write the fork as a series of patches for upstream's source."""
    from overlay.description import describe
    from overlay.patch import write_patches
    from overlay.series import load_series
    from overlay.source import find_source

    version = options.base or CUDA.default_version
    write_patches(find_source(version), version, options.out)
    series = load_series(ROOT / "overlay" / "upstream.toml")
    description = options.out / "description.md"
    description.write_text(describe(series, ROOT))
    print(*sorted(options.out.glob("*.patch")), description, sep="\n")


def venv(options: argparse.Namespace) -> None:
    """Make a working environment, or bring it up to date."""
    from overlay.venv import make_venv

    make_venv(options.base)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="python -m overlay", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="command")

    def add(command: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.add_argument("--base", help="version of the base, such as 0.22.1")
        sub.set_defaults(run=command)
        return sub

    add(build).add_argument("--out", type=Path, default=Path("dist"))
    add(develop).add_argument("--venv", type=Path, default=ROOT / ".venv")
    add(lay).add_argument("folder", type=Path)
    add(patch).add_argument("--out", type=Path, default=Path("dist/upstream"))
    add(venv)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except OverlayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
