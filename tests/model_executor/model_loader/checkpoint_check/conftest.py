# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checkpoints with one thing wrong, and what is found in them."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from shutil import copy

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints import CASES, write_checkpoint
from tests.harness.damage import Tensors, passed_on
from vllm.model_executor.model_loader.checkpoint_check import (
    CheckpointReport,
    check_checkpoint,
    open_checkpoint,
)

Change = Callable[[Tensors], object]


@pytest.fixture
def check() -> Callable[[Path], CheckpointReport]:
    """Check the checkpoint in a folder."""
    return lambda folder: check_checkpoint(open_checkpoint(str(folder)), passed_on)


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Callable[[str], Path]:
    """The sound checkpoint of a case."""
    root = tmp_path_factory.mktemp("original")
    return cache(lambda case: write_checkpoint(CASES[case], 1, root / case))


@pytest.fixture
def write(original, tmp_path) -> Callable[[str, Change], Path]:
    """Write the checkpoint of a case, its tensors changed in place as told."""

    def write_changed(case: str, change: Change) -> Path:
        folder = original(case)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        copy(folder / "config.json", tmp_path)
        return tmp_path

    return write_changed


@pytest.fixture
def configure() -> Callable[..., None]:
    """Change fields of the config in a folder; None removes one."""

    def change(folder: Path, **fields: object) -> None:
        file = folder / "config.json"
        config = {**json.loads(file.read_text()), **fields}
        kept = {key: value for key, value in config.items() if value is not None}
        file.write_text(json.dumps(kept))

    return change
