# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sync a checkpoint into a running server on the same host, through shared memory.

    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL \
        --weight-transfer-config '{"backend": "shm"}'
    python examples/rl/shm_trainer.py http://localhost:8000 FOLDER

VLLM_API_KEY is the server's key, if it has one, for both.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any
from uuid import uuid4

import requests
import torch
from safetensors.torch import load_file

Named = tuple[str, torch.Tensor]

ALIGNMENT = 16  # a multiple of every element size


class Trainer:
    """Pushes tensors to a server, chunk by chunk through one bucket.

    Args:
        url: The server's.
        api_key: The server's, if it asks for one.
        bucket_bytes: Size of the bucket; the biggest tensor has to fit.
    """

    def __init__(self, url: str, api_key: str = "", bucket_bytes: int = 1 << 30):
        self._url, self._headers = url, {"Authorization": f"Bearer {api_key}"}
        self.segment = f"vllm-weights-{uuid4().hex}"
        self._bucket = SharedMemory(self.segment, create=True, size=bucket_bytes)
        try:
            info = {"segment": self.segment}
            self.post("init_weight_transfer_engine", init_info=info)
        except BaseException:
            self.close()
            raise

    def sync(self, tensors: Iterable[Named], version: str | None = None) -> Any:
        """Push a checkpoint; it serves when this returns.

        Args:
            tensors: All of it, by name.
            version: What to call the weights, from vLLM 0.32 on.

        Returns:
            What the server says of the sync, such as `pause_seconds`.
        """
        self.post("start_weight_update")
        try:
            for chunk in self._chunks(tensors):
                self.post("update_weights", update_info=chunk)
        except Exception:
            self.post("abort_weight_update")
            raise
        name = {"weight_version": version} if version else {}
        return self.post("finish_weight_update", **name)["sync"]

    def post(self, route: str, **body: Any) -> Any:
        """Ask the server, and return its answer.

        Raises:
            requests.HTTPError: It refuses; the error holds what it finds wrong.
        """
        answer = requests.post(
            f"{self._url}/{route}", json=body, headers=self._headers, timeout=600
        )
        if not answer.ok:
            raise requests.HTTPError(answer.text, response=answer)
        return answer.json()

    def close(self) -> None:
        """Free the bucket."""
        self._bucket.close()
        self._bucket.unlink()

    def _chunks(self, tensors: Iterable[Named]) -> Iterator[dict[str, Any]]:
        chunk, start = self._empty_chunk(), 0
        for name, tensor in tensors:
            if tensor.nbytes > self._bucket.size:
                raise ValueError(f"{name} needs a bucket of {tensor.nbytes} bytes")
            if chunk["names"] and start + tensor.nbytes > self._bucket.size:
                yield chunk
                chunk, start = self._empty_chunk(), 0
            self._write(tensor, start)
            chunk["names"].append(name)
            chunk["dtype_names"].append(str(tensor.dtype).removeprefix("torch."))
            chunk["shapes"].append(list(tensor.shape))
            chunk["offsets"].append(start)
            start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        yield chunk

    def _empty_chunk(self) -> dict[str, Any]:
        lists = ("names", "dtype_names", "shapes", "offsets")
        return {"segment": self.segment, **{key: [] for key in lists}}

    def _write(self, tensor: torch.Tensor, start: int) -> None:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        place = torch.frombuffer(self._bucket.buf, dtype=torch.uint8)
        place[start : start + tensor.nbytes] = data


def checkpoint(folder: Path) -> Iterator[Named]:
    """Yield names and tensors of a folder of safetensors."""
    for path in sorted(folder.glob("*.safetensors")):
        yield from load_file(path).items()


if __name__ == "__main__":
    url, folder = sys.argv[1:]
    trainer = Trainer(url, os.environ.get("VLLM_API_KEY", ""))
    try:
        trainer.sync(checkpoint(Path(folder)))
    finally:
        trainer.close()
