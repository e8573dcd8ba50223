# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Write a case to disk: config.json, safetensors files and, if asked, a tokenizer."""

import json
import random
from pathlib import Path

from safetensors.torch import save_file

from .case import Case
from .tokenizer import write_tokenizer


def write_checkpoint(
    case: Case, seed: int, folder: Path, tokenizer: bool = False, device: str = "cpu"
) -> Path:
    """Write a checkpoint that vLLM loads like a released one.

    Args:
        case: What to write.
        seed: Another seed changes every tensor.
        folder: Where to; made if it is not there.
        tokenizer: Add a tokenizer, so that the model takes and gives text.
        device: Where the values are drawn, see `Case.tensors`.

    Returns:
        The folder.
    """
    _write_config(case, folder)
    tensors = {n: t.cpu().contiguous() for n, t in case.tensors(seed, device)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        write_tokenizer(folder, case.sizes.vocab)
    return folder


def write_shards(case: Case, seed: int, folder: Path, shards: int) -> Path:
    """Write a checkpoint whose tensors are dealt out to files at random.

    Args:
        case: What to write.
        seed: Another seed changes every tensor, and where it is.
        folder: Where to; made if it is not there.
        shards: How many files.

    Returns:
        The folder.
    """
    _write_config(case, folder)
    dealt = random.Random(seed)
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    tensors = dict(case.tensors(seed))
    index = {name: dealt.choice(files) for name in tensors}
    for file in files:
        stored = {n: t.contiguous() for n, t in tensors.items() if index[n] == file}
        save_file(stored, folder / file, metadata={"format": "pt"})
    content = json.dumps(dict(metadata={}, weight_map=index))
    (folder / "model.safetensors.index.json").write_text(content)
    return folder


def _write_config(case: Case, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config(), indent=1))
