# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a trainer says of the tensors of a chunk: lists with an entry for each of them.

It may say anything, so types and counts are checked before a value is used. A trainer
in the process of the engine may have tuples for lists.
"""

import reprlib
from dataclasses import dataclass
from typing import Any, NoReturn

__all__ = ["Entry", "check_lists", "is_size", "short"]

MAX_DIMENSIONS = 8
MAX_NAME = 1024


@dataclass(frozen=True)
class Entry:
    """What a trainer says of one tensor; of any type."""

    index: int
    name: Any
    dtype_name: Any
    shape: Any

    def check_name(self) -> None:
        """Check the tensor's name.

        Raises:
            ValueError: it cannot be one.

        """
        if not isinstance(self.name, str) or not 0 < len(self.name) <= MAX_NAME:
            self._refuse("name", f"1 to {MAX_NAME} characters", self.name)

    def check_shape(self) -> None:
        """Check the tensor's shape.

        Raises:
            ValueError: it cannot be one.

        """
        if not _is_shape(self.shape):
            self._refuse("shape", f"a list of up to {MAX_DIMENSIONS} sizes", self.shape)

    def _refuse(self, what: str, expected: str, got: Any) -> NoReturn:
        raise ValueError(
            f"update_info: tensor {self.index}, {short(self.name)}: "
            f"expected {what}: {expected}, got {short(got)}"
        )


def check_lists(lists: dict[str, Any], max_tensors: int) -> None:
    """Check that lists have an entry for each tensor.

    Args:
        lists: what a trainer sent, by its name in the request; of any type.
        max_tensors: how many tensors a chunk may have.

    Raises:
        ValueError: one is no list, their lengths differ, or they are too long.

    """
    for key, values in lists.items():
        if not isinstance(values, list | tuple):
            raise ValueError(
                f"update_info: expected a list as {key!r}, got {short(values)}"
            )
    counts = {key: len(values) for key, values in lists.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"update_info: expected lists of the same length, got {counts}"
        )
    if counts["names"] > max_tensors:
        raise ValueError(
            f"update_info: expected up to {max_tensors} tensors, got "
            f"{counts['names']}; send them in several chunks"
        )


def is_size(value: Any) -> bool:
    """Whether a value is a count, as of elements or bytes."""
    return type(value) is int and 0 <= value < 1 << 63


def short(value: Any) -> str:
    """Return what a message can quote of a value, whatever it is."""
    # Unlike `repr`, it neither fails nor writes out a list of a million.
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 80
    return f"{brief.repr(value):.80}"


def _is_shape(value: Any) -> bool:
    is_list = isinstance(value, list | tuple)
    return is_list and len(value) <= MAX_DIMENSIONS and all(map(is_size, value))
