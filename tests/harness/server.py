# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A real server in a process of its own, asked over HTTP."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

KEY = "the key of this test"
START_SECONDS = 300
STOP_SECONDS = 30
# For tiny models on a GPU, where servers start beside each other.
GPU_OPTIONS = [
    *("--attention-backend", "TRITON_ATTN", "--gpu-memory-utilization", "0.1"),
    *("--kv-cache-memory-bytes", str(1 << 28)),
]


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        url: where.
        process: its process, which leads a group of its own.
        log: what it has printed.
    """

    url: str
    process: subprocess.Popen
    log: Path

    def post(self, route: str, body: Any, key: str = KEY) -> requests.Response:
        """Ask it."""
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        # `requests` would not send NaN, as others do.
        data = json.dumps(body)
        return requests.post(
            f"{self.url}/{route}", data=data, headers=headers, timeout=60
        )

    @contextmanager
    def stream(self, route: str, body: Any) -> Iterator[Iterator[dict]]:
        """Ask it for a stream, and give what comes as it comes."""
        headers = {"Authorization": f"Bearer {KEY}"}
        with requests.post(
            f"{self.url}/{route}",
            json={**body, "stream": True},
            headers=headers,
            timeout=60,
            stream=True,
        ) as response:
            lines = (line.removeprefix(b"data: ") for line in response.iter_lines())
            yield (json.loads(line) for line in lines if line not in (b"", b"[DONE]"))

    def wait(self) -> None:
        """Wait until it serves.

        Raises:
            RuntimeError: it ended, or takes too long; the message ends with its log.
        """
        deadline = time.monotonic() + START_SECONDS
        while not self._is_healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = self.log.read_text()[-5000:]
                raise RuntimeError(f"the server does not start:\n{tail}")
            time.sleep(1)

    def stop(self) -> None:
        """End it and what it has started."""
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        finally:
            _end_group(self.process.pid)

    def _is_healthy(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=5).ok
        except requests.ConnectionError:
            return False


@contextmanager
def starting(
    model: Path, log: Path, options: list[str], environment: Mapping[str, str]
) -> Iterator[Server]:
    """Start a server in dev mode that asks for `KEY`; it is stopped at the end.

    Args:
        model: folder of the checkpoint.
        log: file for what it prints.
        options: more of the command line.
        environment: more variables.
    """
    port = str(_free_port())
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", port, "--api-key", KEY, *options]
    variables = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", **environment}
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            # In a session of its own it could leave no processor to its clients.
            process_group=0,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        yield server
    finally:
        server.stop()


def refused(act: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[int, dict]:
    """Return the status and the error of a request that is refused."""
    with pytest.raises(requests.HTTPError) as raised:
        act(*args, **kwargs)
    response = raised.value.response
    return response.status_code, response.json()["error"]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _end_group(leader: int) -> None:
    """Let workers free their shared memory, and kill those that take too long."""
    deadline = time.monotonic() + STOP_SECONDS
    try:
        while time.monotonic() < deadline:
            os.killpg(leader, 0)
            time.sleep(0.1)
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return
