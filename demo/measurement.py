# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What became of one sync, as a process that measures tells the one that started it."""

import json
from dataclasses import asdict, dataclass
from enum import Enum

# Tells a measurement from whatever else vLLM writes to standard output.
MARK = "measured: "


class Outcome(Enum):
    """What became of the weights, as the table says it.

    NEW: they equal a cold load of the new checkpoint, bit by bit.
    OLD: the sync raised, and the old weights serve on, bit by bit.
    FENCED: the sync raised, requests are refused, and a complete sync repaired it.
    WRONG: nothing was raised, and the weights are neither.
    BROKEN: the sync raised, and left weights that are neither.
    ABSENT: this vLLM cannot serve such a checkpoint on this machine.
    """

    NEW = "same as a cold load"
    OLD = "refused, the old weights serve on"
    FENCED = "refused, fenced until a complete sync"
    WRONG = "WRONG, silently"
    BROKEN = "BROKEN"
    ABSENT = "does not start"


@dataclass(frozen=True)
class Measurement:
    """The outcome of one case on one side.

    Attributes:
        case: title of the case.
        outcome: what became of the weights.
        detail: what was counted or compared, in a few words.
        error: what the sync raised, type and message; empty if nothing.
    """

    case: str
    outcome: Outcome
    detail: str = ""
    error: str = ""

    def report(self) -> None:
        """Tell it to the process that started this one."""
        fields = asdict(self) | dict(outcome=self.outcome.name)
        print(f"{MARK}{json.dumps(fields)}", flush=True)

    @classmethod
    def read(cls, line: str) -> "Measurement | None":
        """Return what a line of a measuring process reports, if it does."""
        _, mark, report = line.partition(MARK)
        if not mark:
            return None
        fields = json.loads(report)
        return cls(**fields | dict(outcome=Outcome[fields["outcome"]]))


def describe(error: Exception) -> str:
    """Return an exception's type and message."""
    return f"{type(error).__name__}: {error}"
