# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Clients that do not stay for the answer."""

import json
import multiprocessing
import os
import select
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import contextmanager
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

from tests.harness.server import KEY, Server

__all__ = ["Leaves", "lose", "run_and_kill"]

SECONDS = 60
RESET, STAY = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)


class Leaves(Enum):
    """When a client is gone.

    HALF_WAY: it has sent one half of its request.
    AT_ONCE: it has sent all of it, and waits for nothing.
    UNREAD: the answer is there, and it reads none of it.
    """

    HALF_WAY = "half way"
    AT_ONCE = "at once"
    UNREAD = "unread"


def lose(server: Server, route: str, body: Any, when: Leaves) -> None:
    """Ask a server, and go: who does not wait closes the connection, others reset it.

    Raises:
        TimeoutError: no answer came that could have been left unread.
    """
    request = _request(server, route, body)
    with _connected(server) as connection:
        if when is Leaves.HALF_WAY:
            connection.sendall(request[: len(request) // 2])
            return
        connection.sendall(request)
        if when is Leaves.UNREAD:
            _await_answer(connection, route)
        else:  # a reset may overtake the request
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, STAY)


def run_and_kill(act: Callable[[], None]) -> None:
    """Do something in a process that is killed after that, with SIGKILL.

    Raises:
        RuntimeError: it ended in another way.
    """
    # Of a process that was started afresh most time would go into its imports.
    context = multiprocessing.get_context("fork")

    def killed() -> None:
        act()
        os.kill(os.getpid(), signal.SIGKILL)

    process = context.Process(target=killed)
    process.start()
    process.join(2 * SECONDS)
    if process.exitcode != -signal.SIGKILL:
        process.kill()
        raise RuntimeError(f"a trainer ended with {process.exitcode}, was not killed")


@contextmanager
def _connected(server: Server):
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), SECONDS) as made:
        # Closed like this it is reset, as when a client's machine has crashed.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        yield made


def _await_answer(connection: socket.socket, route: str) -> None:
    answered, _, _ = select.select([connection], [], [], SECONDS)
    if not answered:
        raise TimeoutError(f"no answer from {route} within {SECONDS} s")


def _request(server: Server, route: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = [
        f"POST /{route} HTTP/1.1",
        f"Host: {urlsplit(server.url).netloc}",
        f"Authorization: Bearer {KEY}",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    ]
    return "\r\n".join([*head, "", ""]).encode() + data
