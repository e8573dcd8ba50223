# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a user is shown of a comparison."""

from rich.console import Console
from rich.table import Table

from overlay.base import Base
from tests.upstream.comparison import Comparison, passed, per_file

_WIDTH = 160


def print_report(console: Console, comparison: Comparison, base: Base) -> None:
    """Print the numbers for each file, then the names of what was lost or gained."""
    console.print(_table(comparison, base))
    for name in comparison.lost:
        kind = "lost" if name in comparison.unexpected else "lost, as expected"
        outcome = comparison.fork.get(name, "not run")
        console.print(f"{kind}: {name}\n  {outcome[:_WIDTH]}", markup=False)
    for name in comparison.gained:
        console.print(f"gained: {name}", markup=False)


def _table(comparison: Comparison, base: Base) -> Table:
    names = passed(comparison.base), passed(comparison.fork)
    counts = [per_file(each) for each in names]
    counts += [per_file(set(each)) for each in (comparison.lost, comparison.gained)]
    table = Table(title=f"Tests of vLLM {base.version} that pass", show_footer=True)
    files = sorted(per_file({*comparison.base, *comparison.fork}))
    table.add_column("file", "all", overflow="fold")
    headers = "base", "fork", "lost", "gained"
    for header, count in zip(headers, counts, strict=True):
        table.add_column(header, str(count.total()), justify="right")
    for file in files:
        table.add_row(
            file.removeprefix("tests/"), *(str(count[file]) for count in counts)
        )
    return table
