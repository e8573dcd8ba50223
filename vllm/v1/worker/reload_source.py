# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where a reload reads its weights, when it fails.

A reload notes in the model's configuration where the new weights are before it looks
for them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    RepositoryNotFoundError,
)

__all__ = ["source_kept", "source_named"]

# What a model's configuration says of where its weights are.
SOURCE = ("model", "model_weights", "revision")

# What is no folder is taken for the id of a repository.
NO_SUCH_REPOSITORY = (EntryNotFoundError, HFValidationError, RepositoryNotFoundError)
WEIGHTS = (".safetensors", ".bin", ".pt")


@contextmanager
def source_kept(worker: Any) -> Iterator[None]:
    """If a block fails, let the model come from where it came before."""
    config = worker.vllm_config.model_config
    # A configuration of a worker may be without one of a model.
    before = {name: getattr(config, name) for name in SOURCE if config is not None}
    try:
        yield
    except BaseException:
        for name, value in before.items():
            setattr(config, name, value)
        raise


@contextmanager
def source_named(worker: Any) -> Iterator[None]:
    """If a block finds no weights where it looks for them, say where that is.

    Raises:
        ValueError: there are none; it is the fault of who named the place.

    """
    config = worker.vllm_config.model_config
    try:
        yield
    except NO_SUCH_REPOSITORY as error:
        raise ValueError(
            "weights_path: expected a folder that is there for each worker, or the id "
            f"of a repository, got {_place(config.model)}, which is no folder, and as "
            f"a repository: {error}"
        ) from error
    except RuntimeError as error:
        if config is None or not _is_without_weights(Path(config.model)):
            raise
        raise ValueError(
            f"weights_path: expected a folder with a checkpoint, got "
            f"{_place(config.model)}, which holds no file in {', '.join(WEIGHTS)}"
        ) from error


def _place(source: str) -> str:
    """Return what names a place; from 0.32 on answers over HTTP leave paths out."""
    path = Path(source)
    return f"{path.name!r} in {str(path.parent)!r}"


def _is_without_weights(folder: Path) -> bool:
    return folder.is_dir() and not any(f.suffix in WEIGHTS for f in folder.iterdir())
