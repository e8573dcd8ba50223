# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The public lifecycle of weight syncs, and its adapters to loaders of other kinds.

    initialize_layerwise_reload(model)
    for chunk in chunks:
        model.load_weights(chunk)
    finalize_layerwise_reload(model, model_config)

Weights may also be processed while a model is first loaded (online quantisation):
`initialize_online_processing` opens one layer, and `finalize_layerwise_processing`
closes what the checkpoint left open.
"""

from collections.abc import Callable, Iterable
from weakref import WeakSet

import torch

import vllm.envs as envs
from vllm.config import ModelConfig
from vllm.logger import init_logger

from .agreement import agree_across_ranks
from .committer import CommitPolicy
from .errors import WeightSyncError
from .first_load import finish_recording, original_loader, start_recording
from .meta import SKIP_LOAD_TENSORS
from .model_reload import ModelReload
from .online import OnlineLoad
from .processing import is_attention
from .reach import SyncReach
from .registry import LAYERWISE_INFO, get_layerwise_info
from .rollback import Rollback
from .route import Route
from .status import ReloadStatus
from .sync_report import SyncReport
from .transaction import ReloadTransaction
from .types import LayerReloadingInfo
from .utils import get_info_size, get_layer_tensors, has_device_tensors

__all__ = [
    "LAYERWISE_INFO",
    "LOADING_LAYERS",
    "SKIP_LOAD_TENSORS",
    "abort_layerwise_reload",
    "finalize_layerwise_processing",
    "finalize_layerwise_reload",
    "finish_first_load",
    "get_layerwise_info",
    "initialize_layerwise_reload",
    "initialize_online_processing",
    "mark_inconsistent",
    "note_unchecked",
    "planned_routes",
    "prepare_layerwise_reload",
    "tensors_sent",
    "record_metadata_for_reloading",
    "reload_status",
    "sent_checksums",
    "take_reach",
    "take_reports",
]

logger = init_logger(__name__)

# For the warning about memory only.
LOADING_LAYERS: WeakSet[torch.nn.Module] = WeakSet()


def record_metadata_for_reloading(model: torch.nn.Module) -> None:
    """Note how `model` was created; call it before anything is loaded."""
    start_recording(model)


def finish_first_load(model: torch.nn.Module) -> None:
    """Note that the first load is over; call it before weights are processed."""
    loaded = finish_recording(model)
    reload = _model_reload(model)
    reload.first_loaded |= loaded


def initialize_layerwise_reload(model: torch.nn.Module, exposed: bool = False) -> None:
    """Open a sync of new weights in checkpoint format into `model`.

    A sync that is still open is aborted.

    Args:
        model: the model, noted by `record_metadata_for_reloading`.
        exposed: whether parameters shall show the staged tensors from now on, for
            callers that drive their loaders and not `model.load_weights`.

    Raises:
        ValueError: VLLM_RELOAD_COMMIT names no commit policy, or VLLM_RELOAD_ROLLBACK
            no kind of rollback.

    """
    model = _unwrapped(model)
    reload = _model_reload(model)
    if reload.transaction is not None:
        if reload.transaction.is_open:
            logger.warning("A weight sync was open and is aborted: another one starts.")
        reload.transaction.abort("another weight sync was started")
    finish_first_load(model)
    policy = CommitPolicy.from_environment()
    rollback = Rollback.from_environment()
    if policy is CommitPolicy.MODEL:
        rollback = None  # until all is known to be good, nothing is overwritten
    # The default device is a mode that each question to a tensor goes through.
    with torch._C.DisableTorchFunction():
        transaction = ReloadTransaction(model, reload, policy, exposed, rollback)
    transaction.open()


def prepare_layerwise_reload(
    model: torch.nn.Module, model_config: ModelConfig | None
) -> None:
    """Do all of `finalize_layerwise_reload` that can be refused, if a sync is open.

    Raises:
        WeightSyncError: as there.

    """
    transaction = _model_reload(_unwrapped(model)).transaction
    if isinstance(transaction, ReloadTransaction):
        transaction.prepare(model_config)


def finalize_layerwise_reload(
    model: torch.nn.Module, model_config: ModelConfig | None
) -> None:
    """Commit the open sync.

    Raises:
        WeightSyncError: it is incomplete or invalid, was aborted, or never started. The
            old weights serve on, or the model is inconsistent: see `reload_status`.

    """
    model = _unwrapped(model)
    transaction = _model_reload(model).transaction
    if transaction is not None:
        transaction.finish(model_config)
        return
    if not any(get_layerwise_info(layer).can_load() for layer in model.modules()):
        with agree_across_ranks():  # other ranks may be waiting for this one's vote
            raise WeightSyncError("no weight sync is open, start one first")
    finalize_layerwise_processing(model, model_config)


def abort_layerwise_reload(
    model: torch.nn.Module, reason: str, error: BaseException | None = None
) -> None:
    """Drop the open sync, if there is one.

    Args:
        model: the model.
        reason: why.
        error: what was raised, if the sync is dropped because it failed.

    """
    transaction = _model_reload(_unwrapped(model)).transaction
    if transaction is not None:
        transaction.abort(reason, error)


def reload_status(model: torch.nn.Module) -> ReloadStatus:
    """What can be said of the weights that `model` serves."""
    return _model_reload(_unwrapped(model)).status


def sent_checksums(model: torch.nn.Module) -> dict[str, str]:
    """Checksums of the tensors that `model` serves, as syncs were sent them.

    Returns:
        By checkpoint name, as `checksums` has them; nothing for what only a first load
        brought.

    Raises:
        ValueError: VLLM_RELOAD_CHECKSUMS does not ask for them.
        WeightSyncError: the model serves no whole weights.

    """
    if not envs.VLLM_RELOAD_CHECKSUMS:
        raise ValueError("set VLLM_RELOAD_CHECKSUMS=1 before a sync to get checksums")
    reload = _model_reload(_unwrapped(model))
    if reload.lost:
        raise WeightSyncError(f"the weights are inconsistent: {reload.lost}")
    return reload.checksums


def take_reports(model: torch.nn.Module) -> list[SyncReport]:
    """Reports of the syncs that have ended since they were taken last.

    The last hundred are kept, without a row for each layer.
    """
    ended = _model_reload(_unwrapped(model)).ended
    return [ended.popleft() for _ in range(len(ended))]


def planned_routes(model: torch.nn.Module) -> dict[str, Route]:
    """The routes that the open sync takes, by checkpoint name; none without a sync."""
    transaction = _model_reload(_unwrapped(model)).transaction
    if isinstance(transaction, ReloadTransaction) and transaction.is_open:
        return transaction.routes
    return {}


def tensors_sent(model: torch.nn.Module) -> int | None:
    """How many tensors the open sync was sent; None where nobody counts them."""
    transaction = _model_reload(_unwrapped(model)).transaction
    return transaction.sent if isinstance(transaction, ReloadTransaction) else None


def take_reach(model: torch.nn.Module) -> SyncReach | None:
    """What the last sync wrote, told once; None where nobody took note."""
    reload = _model_reload(_unwrapped(model))
    reach, reload.reach = reload.reach, None
    return reach


def mark_inconsistent(model: torch.nn.Module, reason: str, fenced: bool = True) -> None:
    """Note that `model` serves no whole weights; the next sync owes all of them.

    Args:
        model: the model.
        reason: why, for whoever asks or is refused.
        fenced: whether requests must be refused. Not after dummy weights, which are
            there to be run, nor after a sleep that dropped the weights: they may be
            put back by other roads than a sync.

    """
    reload = _model_reload(_unwrapped(model))
    reload.lost, reload.fenced = reason, fenced


def note_unchecked(model: torch.nn.Module, road: str) -> None:
    """Note that weights come into the tensors that serve, past the checks of a sync.

    Args:
        model: the model.
        road: how, for the log and for whoever asks.

    """
    logger.warning(
        "Weights come past the checks of a sync (%s): whether all of them do, and "
        "whether their scales are valid, is not known.",
        road,
    )
    _model_reload(_unwrapped(model)).unchecked = road


def initialize_online_processing(layer: torch.nn.Module) -> None:
    """Process `layer` as soon as a first load has brought all of its weights."""
    info = get_layerwise_info(layer)
    if info.staged is None:
        OnlineLoad(layer, info, _note_open_layer).open()


def finalize_layerwise_processing(
    model: torch.nn.Module, model_config: ModelConfig | None
) -> None:
    """Process the layers that a first load left open, attention after the others."""
    layers = [
        layer for layer in model.modules() if get_layerwise_info(layer).can_load()
    ]
    for layer in sorted(layers, key=is_attention):
        staged = get_layerwise_info(layer).staged
        if isinstance(staged, OnlineLoad):
            staged.finish(model_config)
    LOADING_LAYERS.clear()


def _note_open_layer(layer: torch.nn.Module, values: Iterable[object]) -> None:
    """Warn once, when a second layer is staged on the device beside the first."""
    if layer in LOADING_LAYERS or not has_device_tensors(values):
        return
    LOADING_LAYERS.add(layer)
    if len(LOADING_LAYERS) != 2:
        return
    held = sum(get_info_size(get_layerwise_info(each)) for each in LOADING_LAYERS)
    kinds = sorted(type(each).__name__ for each in LOADING_LAYERS)
    logger.warning_once(
        "Staging %.1f MB of device memory for layers %s at once. Send the weights "
        "layer by layer to need the memory of one.",
        held / 1e6,
        ", ".join(kinds),
    )


def _model_reload(model: torch.nn.Module) -> ModelReload:
    info = get_layerwise_info(model)
    if info.model is None:
        info.model = ModelReload()
    return info.model


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside a wrapper that captures or splits its forward pass."""
    return model if isinstance(model, torch.nn.Module) else model.unwrap()


# For engines that drive a layer's tensors themselves, see `exposed` above.


def _get_original_loader(tensor: torch.Tensor) -> Callable:
    return original_loader(tensor)


def _place_kernel_tensors(layer: torch.nn.Module, info: LayerReloadingInfo) -> None:
    """Register the tensors that serve again."""
    assert info.kernel_tensors is not None
    for name in get_layer_tensors(layer):
        delattr(layer, name)
    params, buffers = info.kernel_tensors
    for name, param in params.items():
        setattr(layer, name, param)
    for name, buffer in buffers.items():
        persistent = name not in info.kernel_non_persistent_buffers
        layer.register_buffer(name, buffer, persistent=persistent)


@torch.no_grad()
def _copy_and_restore_kernel_tensors(
    layer: torch.nn.Module, info: LayerReloadingInfo
) -> None:
    """Copy a layer's tensors into those that serve, and register these again."""
    assert info.kernel_tensors is not None
    params, buffers = info.kernel_tensors
    transient = info.kernel_non_persistent_buffers
    for name, kernel in {**params, **buffers}.items():
        loaded = getattr(layer, name, None)
        if name not in transient and loaded is not None and not loaded.is_meta:
            kernel.data.copy_(loaded)
    _place_kernel_tensors(layer, info)
