# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Write a case to disk: config.json, model.safetensors and, if asked, a tokenizer."""

import json
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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config(), indent=1))
    tensors = {n: t.cpu().contiguous() for n, t in case.tensors(seed, device)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        write_tokenizer(folder, case.sizes.vocab)
    return folder
