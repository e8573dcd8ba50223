# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What each side did with each case, whether the fork was right, and the table."""

from dataclasses import dataclass, field
from textwrap import shorten

from rich import box
from rich.table import Table

from demo.faults import FAULTS, Fault
from demo.measurement import Measurement, Outcome
from demo.serving import SERVICES

LAYER, MODEL = "layer", "model"
INCONSISTENT = "The weights of this engine are inconsistent"


@dataclass(frozen=True)
class Wanted:
    """What the fork has to do: the outcome, and what one line of its error names."""

    outcome: Outcome
    error: str = ""
    names: tuple[str, ...] = ()

    def fits(self, measured: Measurement | None) -> bool:
        """Whether that was measured."""
        return (
            measured is not None
            and measured.outcome is self.outcome
            and measured.error.startswith(self.error)
            and bool(measured.error) == bool(self.error)
            and (not self.names or self.names_in(measured) != "")
        )

    def names_in(self, measured: Measurement) -> str:
        """The line of an error that names everything; empty if none does."""
        lines = (line.strip() for line in measured.error.splitlines())
        return next((s for s in lines if all(n in s for n in self.names)), "")


def wanted(commit: str) -> dict[str, Wanted]:
    """What the fork has to do with each case, by title, under a commit policy."""
    expected = {}
    if commit == LAYER:
        for service in SERVICES.values():
            expected[service.synced] = Wanted(Outcome.NEW)
            expected[service.died] = Wanted(
                Outcome.FENCED, "WeightsInconsistentError", (INCONSISTENT,)
            )
    return expected | {fault.title: _wanted(fault, commit) for fault in FAULTS}


def _wanted(fault: Fault, commit: str) -> Wanted:
    if not fault.error:
        return Wanted(Outcome.NEW)
    refused = Outcome.FENCED if commit == LAYER else Outcome.OLD
    return Wanted(refused, fault.error, fault.names)


@dataclass
class Comparison:
    """What was measured, by title of the case."""

    released: dict[str, Measurement] = field(default_factory=dict)
    fork: dict[str, dict[str, Measurement]] = field(
        default_factory=lambda: {LAYER: {}, MODEL: {}}
    )

    def wrong(self) -> list[str]:
        """The fork's cells that are not right: "<case>, commit per <policy>"."""
        return [
            f"{title}, commit per {commit}"
            for commit, measured in self.fork.items()
            for title, each in wanted(commit).items()
            if not each.fits(measured.get(title))
        ]

    def table(self, released: str, fork: str) -> Table:
        """The table, under the names of the two sides."""
        table = Table(box=box.SIMPLE_HEAD, show_lines=True)
        for heading in ("case", released, fork):
            table.add_column(heading, overflow="fold")
        for title, each in wanted(LAYER).items():
            measured = self.released.get(title)
            there = _cell(measured) if measured else "not measured"
            table.add_row(title, there, self._fork_cell(title, each))
        return table

    def _fork_cell(self, title: str, each: Wanted) -> str:
        measured = self.fork[LAYER].get(title)
        if measured is None:
            return "not measured"
        named = each.names_in(measured) if each.names else ""
        lines = [_cell(measured), shorten(named, 160)]
        aside = self.fork[MODEL].get(title)
        if aside is not None and aside.outcome is not measured.outcome:
            lines.append(f"commit per model: {aside.outcome.value}")
        return "\n".join(line for line in lines if line)


def _cell(measured: Measurement) -> str:
    said = measured.outcome.value
    return f"{said}: {measured.detail}" if measured.detail else said
