# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What two runs of the same tests have to do with each other."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

# tests by name: "passed", or what else became of them and why
Outcomes = dict[str, str]

PASSED = "passed"
_HEADING = "## Expected losses"
_LISTED = re.compile(r"^- `([^`]+)`: \S", re.MULTILINE)


@dataclass(frozen=True)
class Comparison:
    """The outcomes of both sides.

    Attributes:
        base: outcomes on the base.
        fork: outcomes on the fork.
        expected: tests that may be lost.
    """

    base: Outcomes
    fork: Outcomes
    expected: frozenset[str] = frozenset()

    @property
    def lost(self) -> list[str]:
        """Tests that pass on the base alone, whatever became of them on the fork."""
        return sorted(passed(self.base) - passed(self.fork))

    @property
    def gained(self) -> list[str]:
        """Tests that pass on the fork alone."""
        return sorted(passed(self.fork) - passed(self.base))

    @property
    def unexpected(self) -> list[str]:
        """Lost tests that nobody listed."""
        return [name for name in self.lost if name not in self.expected]


def passed(outcomes: Outcomes) -> set[str]:
    """Names of the tests that passed."""
    return {name for name, outcome in outcomes.items() if outcome == PASSED}


def file_of(name: str) -> str:
    """The test file that a test of this name is in."""
    return name.partition("::")[0]


def per_file(names: set[str]) -> Counter[str]:
    """How many of the tests are in each file."""
    return Counter(map(file_of, names))


def read_outcomes(results: Path) -> Outcomes:
    """Read a JUnit report.

    Returns:
        Outcomes by `module.Class::test[parameters]`. An error during the teardown of a
        test that passed is an outcome of its own in the report, and counts.
    """
    outcomes: Outcomes = {}
    for case in ElementTree.parse(results).iter("testcase"):
        name = _name(case.get("classname", ""), case.get("name", ""))
        outcome = _outcome(case)
        if outcomes.get(name, PASSED) == PASSED:
            outcomes[name] = outcome
    return outcomes


def _name(classname: str, test: str) -> str:
    """`tests.a.test_b.TestC` and `test_d` are `tests/a/test_b.py::TestC::test_d`."""
    module, _, inner = re.sub(r"(\.test_\w+)", r"\1|", classname, count=1).partition(
        "|"
    )
    path = module.replace(".", "/") + ".py"
    return "::".join([path, *inner.split(".")[1:], test])


def _outcome(case: ElementTree.Element) -> str:
    for problem in case:
        if problem.tag in ("failure", "error", "skipped"):
            return f"{problem.tag}: {problem.get('message', '')}"
    return PASSED


def expected_losses(document: Path) -> frozenset[str]:
    """Read the expected losses: items "- `test`: reason" under their heading."""
    _, found, text = document.read_text().partition(f"{_HEADING}\n")
    if not found:
        raise ValueError(f"{document}: expected a heading {_HEADING!r}")
    section = text.partition("\n## ")[0]
    return frozenset(_LISTED.findall(section))
