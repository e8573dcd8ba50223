# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tell whether a server serves a checkpoint, bit by bit, however it splits the model.

    VLLM_RELOAD_CHECKSUMS=1 VLLM_SERVER_DEV_MODE=1 \
        python -m vllm.entrypoints.openai.api_server --model MODEL ...
    ...                                                     # at least one sync
    python examples/rl/weight_checksums.py http://localhost:8000 FOLDER

VLLM_API_KEY is the server's key, if it has one. A trainer needs `checksum` alone.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import requests
import torch
from safetensors.torch import load_file

COLUMN, ROW = 0x9E3779B97F4A7C15, 0x6A09E667F3BCC909
WORDS = 4096


def checksum(tensor: torch.Tensor) -> str:
    """Return a tensor's checksum as vLLM computes it, of its bytes in order."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    words = np.pad(data, (0, -data.size % (8 * WORDS))).view("<u8").reshape(-1, WORDS)
    rows = words @ _multipliers(WORDS, COLUMN)
    return f"{int((rows * _multipliers(len(words), ROW)).sum()):016x}"


def differing(
    url: str, tensors: Iterable[tuple[str, torch.Tensor]], api_key: str = ""
) -> list[str]:
    """Return the names of tensors of which a server serves other values.

    Args:
        url: The server's.
        tensors: Names and tensors as they were sent.
        api_key: The server's, if it asks for one.

    Raises:
        requests.HTTPError: It takes no checksums, or serves no whole weights.
    """
    headers = {"Authorization": f"Bearer {api_key}"}
    answer = requests.get(f"{url}/weight_checksums", headers=headers, timeout=600)
    if not answer.ok:
        raise requests.HTTPError(answer.text, response=answer)
    served = answer.json()["checksums"]
    return [name for name, tensor in tensors if served.get(name) != checksum(tensor)]


def _multipliers(count: int, spread: int) -> np.ndarray:
    return np.arange(1, count + 1, dtype="<u8") * np.uint64(spread) | np.uint64(1)


def _checkpoint(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        yield from load_file(path).items()


if __name__ == "__main__":
    url, folder = sys.argv[1:]
    key = os.environ.get("VLLM_API_KEY", "")
    names = differing(url, _checkpoint(Path(folder)), key)
    print(*names, f"{len(names)} tensors differ", sep="\n")
    sys.exit(bool(names))
