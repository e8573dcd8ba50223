# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Send tensors through vLLM's own CUDA IPC backend, as a trainer of either API does."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pybase64 as base64
import torch

from vllm.distributed.weight_transfer import base, ipc_engine

__all__ = ["Client", "json_of", "send_by_ipc"]

Ask = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Client:
    """What a trainer since vLLM 0.32 asks of an engine, as routes and bodies.

    Attributes:
        ask: asks, and returns once the engine has answered.
    """

    ask: Ask

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.ask("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.ask("start_weight_update", {})

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.ask("update_weights", {"update_info": update_info})

    def finish_weight_update(self) -> None:
        self.ask("finish_weight_update", {})


@dataclass(frozen=True)
class Source:
    """What a trainer of vLLM 0.33 sends, where one of 0.32 takes pairs."""

    tensors: Mapping[str, torch.Tensor]

    @property
    def metadata(self) -> list[Any]:
        return [base.ParamMeta(n, t.dtype, t.shape) for n, t in self.tensors.items()]

    def owned_names(self, rank: int) -> list[str]:
        return list(self.tensors)

    def implements_iter_full(self) -> bool:
        return True

    def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors.items()


def send_by_ipc(
    tensors: Mapping[str, torch.Tensor], ask: Ask, packed_bytes: int = 0
) -> None:
    """Send a checkpoint, from start to finish.

    Args:
        tensors: All of it, in memory of the GPU.
        ask: Asks the engine.
        packed_bytes: Size of the bucket; 0 to send each tensor where it is.
    """
    is_new = hasattr(ipc_engine, "IPCTrainerWeightTransferEngine")
    send = _send_since_032 if is_new else _send_before_032
    packing = {"packed_buffer_size_bytes": packed_bytes} if packed_bytes else {}
    send(tensors, Client(ask), packed=bool(packed_bytes), **packing)


def _send_since_032(
    tensors: Mapping[str, torch.Tensor], client: Client, **packing: Any
) -> None:
    is_since_033 = hasattr(base.WeightSource, "implements_iter_full")
    trainer = ipc_engine.IPCTrainerWeightTransferEngine.trainer_init(
        ipc_engine.IPCTrainerInitInfo(rank=0, **packing),
        client=client,
        source=Source(tensors) if is_since_033 else tensors.items(),
    )
    trainer.send_weights()


def _send_before_032(
    tensors: Mapping[str, torch.Tensor], client: Client, **packing: Any
) -> None:
    client.init_weight_transfer_engine({})
    client.start_weight_update()
    ipc_engine.IPCWeightTransferEngine.trainer_send_weights(
        iter(tensors.items()),
        ipc_engine.IPCTrainerSendWeightsArgs(
            send_mode=lambda info: client.update_weights(vars(info)), **packing
        ),
    )
    client.finish_weight_update()


def json_of(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a request as HTTP carries it, handles as a pickle.

    vLLM's own trainers do the same, but send no key.
    """
    info = body.get("update_info")
    if info is None:
        return body
    pickled = base64.b64encode(ForkingPickler.dumps(info["ipc_handles"])).decode()
    rest = {key: value for key, value in info.items() if key != "ipc_handles"}
    return {"update_info": {**rest, "ipc_handles_pickled": pickled}}
