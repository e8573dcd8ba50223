# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A model loader that reads a checkpoint for a sync, by the model's plan.

The base's loader finds the files and reads them as they are cut. In a sync it is known
what goes where: a rank then reads its own parts of the tensors, ahead and layer by
layer. What is not read so, the base's loader reads: when nothing has a route, and where
the user asked for another way to read.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack

import torch
from torch import nn

import vllm.model_executor.model_loader as model_loader
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import _natural_sort_key

from .checkpoint_files import ByteRange, CheckpointFile, StoredTensor
from .layer_order import in_order_of_layers
from .layerwise import planned_routes
from .read_ahead import Wanted, read_ahead
from .route import Route

__all__ = ["CheckpointLoader", "get_model_loader"]

logger = init_logger(__name__)


def get_model_loader(load_config: LoadConfig) -> BaseModelLoader:
    """The loader for a sync from disk: the base's, unless it would read plain files."""
    loader = model_loader.get_model_loader(load_config)
    plain = type(loader) is DefaultModelLoader
    return CheckpointLoader(load_config) if plain else loader


class CheckpointLoader(DefaultModelLoader):
    """Reads what a rank needs, while a sync of the model is open.

    Args:
        load_config: how the user wants checkpoints to be read.

    """

    def __init__(self, load_config: LoadConfig):
        super().__init__(load_config)
        self._routes: dict[str, Route] = {}

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Yield names and tensors; a name that this rank has no use for is left out.

        A tensor is mapped, and what no route copies of it was not read.

        Raises:
            WeightSyncError: a file is cut short, or changed while it is read.

        """
        self._routes = planned_routes(model)
        yield from super().get_all_weights(model_config, model)

    def _get_weights_iterator(
        self, source: DefaultModelLoader.Source
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        paths = self._planned_files(source)
        if paths:
            yield from _read_files(paths, source.prefix, self._routes)
            return
        logger.info("Reading all tensors of %s, as stored.", source.model_or_path)
        yield from super()._get_weights_iterator(source)

    def _planned_files(self, source: DefaultModelLoader.Source) -> list[str]:
        """The files that are to be read by plan; none if they cannot be."""
        if not self._routes or not self._reads_plainly(source):
            return []
        where = source.model_or_path, source.subfolder, source.revision
        which = source.fall_back_to_pt, source.allow_patterns_overrides
        _, paths, is_safetensors, *_ = self._prepare_weights(*where, *which)
        # Of a name in two files the last one counts, as it does in a cold load.
        return sorted(paths, key=_natural_sort_key) if is_safetensors else []

    def _reads_plainly(self, source: DefaultModelLoader.Source) -> bool:
        """Whether the user, or the model, asked for nothing but to read the files."""
        config = self.load_config
        return (
            config.load_format in ("auto", "hf", "safetensors", "mistral")
            and config.safetensors_load_strategy in (None, "lazy")
            and not config.model_loader_extra_config
            and getattr(source, "is_unused_weight", None) is None
        )


def _read_files(
    paths: list[str], prefix: str, routes: dict[str, Route]
) -> Iterator[tuple[str, torch.Tensor]]:
    with ExitStack() as stack:
        files = [stack.enter_context(CheckpointFile(path)) for path in paths]
        stored = {prefix + t.name: t for file in files for t in file.tensors}
        names = {t: name for name, t in stored.items()}
        wanted = [
            Wanted(stored[name], _owned(stored[name], routes.get(name)))
            for name in in_order_of_layers(stored, routes)
            if name not in routes or routes[name].copies
        ]
        _log(files, list(stored.values()), wanted)
        for tensor in read_ahead(wanted):
            tensor.file.check_unchanged(tensor)
            yield names[tensor], tensor.file.map(tensor)
        for last in {tensor.file: tensor for tensor in names}.values():
            last.file.check_unchanged(last)


def _owned(stored: StoredTensor, route: Route | None) -> tuple[ByteRange, ...]:
    """The bytes of a tensor that this rank is known to copy.

    A part with gaps, such as some columns of a matrix, counts from its first byte to
    its last: disks are read in pages, and ahead. Of a tensor without a route its loader
    may want a part only, so that is read when the loader touches it.
    """
    if route is None:
        return ()
    size = route.spec.dtype.itemsize
    parts = {
        (0, stored.nbytes)
        if copy.source is None
        else (copy.source_bytes, copy.source_bytes + copy.source.extent * size)
        for copy in route.copies
    }
    return tuple(sorted(parts))


def _log(
    files: list[CheckpointFile], stored: list[StoredTensor], wanted: list[Wanted]
) -> None:
    logger.info(
        "Reading %d of %d tensors from %d files: %.2f of %.2f GB by plan.",
        len(wanted),
        len(stored),
        len(files),
        sum(each.nbytes for each in wanted) / 1e9,
        sum(each.nbytes for each in stored) / 1e9,
    )
