# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is said of a place without weights; it is the base's loader that looks there."""

from types import SimpleNamespace

import pytest

from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.v1.worker.reload_source import source_named


def look_for_weights(source: str) -> None:
    config = SimpleNamespace(model=source)
    worker = SimpleNamespace(vllm_config=SimpleNamespace(model_config=config))
    with source_named(worker):
        loader = DefaultModelLoader(LoadConfig())
        loader._prepare_weights(source, None, None, True, None)


@pytest.mark.parametrize("folder", ["here", ".", "/no/such/folder"])
def test_a_place_that_is_not_there_is_named(monkeypatch, folder):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expected = f"weights_path: .* got 'step-8' in '{folder}', which is no folder"
    with pytest.raises(ValueError, match=expected):
        look_for_weights(f"{folder}/step-8")


def test_a_folder_without_weights_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    expected = f"weights_path: .* got '{tmp_path.name}' in .* holds no file in"
    with pytest.raises(ValueError, match=expected):
        look_for_weights(str(tmp_path))


def test_what_else_goes_wrong_is_raised_as_it_is(tmp_path):
    (tmp_path / "model.safetensors").touch()
    config = SimpleNamespace(model=str(tmp_path))
    worker = SimpleNamespace(vllm_config=SimpleNamespace(model_config=config))
    with pytest.raises(RuntimeError, match="no kernel"), source_named(worker):
        raise RuntimeError("no kernel")
