# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What becomes of a small object on its way to another process."""

from multiprocessing import Pipe
from typing import TypeVar

T = TypeVar("T")


def through_pipe(value: T) -> T:
    """Return what arrives at the other end."""
    receiver, sender = Pipe(duplex=False)
    with receiver, sender:
        sender.send(value)
        return receiver.recv()
