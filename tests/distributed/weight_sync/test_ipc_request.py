# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a trainer may say through CUDA IPC, and what it is told when it may not.

Host memory stands in for a GPU's. What a server answers is in
`tests/entrypoints/rl/test_ipc_refusal.py`.
"""

from collections.abc import Iterator
from http import HTTPStatus
from inspect import signature
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pybase64 as base64
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness.cuda_stand_in import GPU, SharedMemoryOfGpu, shared_memory_of_a_gpu
from tests.harness.transfer_engine import make_transfer_engine
from vllm.config import VllmConfig
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.ipc_handle import FIELDS
from vllm.distributed.weight_transfer.ipc_request import MAX_TENSORS
from vllm.v1.worker.rpc_failure import RpcFailure

MATRIX = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
SCALAR = torch.tensor(0.5)
BUFFER_BYTES = 32
# Before 0.32 each chunk says whether it is packed.
EACH_SAYS_PACKED = "packed" in signature(IPCWeightTransferUpdateInfo).parameters

Handle = tuple[Any, ...]


class Model(torch.nn.Module):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Any) -> None:
        self.loaded.update(weights)


def make_engine(model: Model, is_packed: bool) -> Any:
    device = torch.device("cuda", 0)
    engine = make_transfer_engine("ipc", device, model, VllmConfig())
    if hasattr(engine, "packed"):
        engine.init_transfer_engine(engine.parse_init_info({"packed": is_packed}))
    return engine


class Trainer:
    """Sends a bfloat16 matrix [2, 3] and a float32 scalar."""

    def __init__(self, gpu: SharedMemoryOfGpu):
        self.model = Model()
        self.buffer = torch.zeros(BUFFER_BYTES, dtype=torch.uint8)
        self.buffer[:12] = MATRIX.view(-1).view(torch.uint8)
        self.buffer[12:16] = SCALAR.view(-1).view(torch.uint8)
        self.lists = {
            "names": ["weight", "scale"],
            "dtype_names": ["bfloat16", "float32"],
            "shapes": [[2, 3], []],
        }
        tensors = (MATRIX.clone(), SCALAR.clone())
        self.handles = [{GPU: gpu.export(tensor)[1]} for tensor in tensors]
        self.of_buffer = {GPU: gpu.export(self.buffer)[1]}

    def send(self, **changed: Any) -> dict[str, torch.Tensor]:
        """Send the tensors with a handle for each."""
        return self._send(False, {"ipc_handles": self.handles, **changed})

    def send_packed(self, **changed: Any) -> dict[str, torch.Tensor]:
        """Send the tensors in a buffer."""
        packed = {"ipc_handles": self.of_buffer, "tensor_sizes": [12, 4]}
        return self._send(True, {**packed, **changed})

    def send_as(self, info: Any, is_packed: bool = False) -> dict[str, torch.Tensor]:
        """Send what need not be an update."""
        engine = make_engine(self.model, is_packed)
        known = {
            "update_info": engine.parse_update_info(info),
            "load_weights": self.model.load_weights,  # before 0.32
        }
        receive = engine.receive_weights
        receive(**{name: known[name] for name in signature(receive).parameters})
        return self.model.loaded

    def _send(self, is_packed: bool, info: dict[str, Any]) -> dict[str, torch.Tensor]:
        said = {"packed": is_packed} if EACH_SAYS_PACKED else {}
        return self.send_as({**self.lists, **said, **info}, is_packed)


@pytest.fixture
def trainer(monkeypatch) -> Iterator[Trainer]:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    with shared_memory_of_a_gpu() as gpu:
        yield Trainer(gpu)


def in_base64(handles: Any) -> str:
    return base64.b64encode(ForkingPickler.dumps(handles)).decode()


def changed(handle: Handle, **fields: Any) -> Handle:
    """Return a handle with other fields."""
    return tuple({**dict(zip(FIELDS, handle)), **fields}.values())


def assert_refused(act: Any, *says: str) -> None:
    """Check that a request is called the client's fault, and why."""
    with pytest.raises(Exception) as raised:
        act()
    assert RpcFailure.of(raised.value).status == HTTPStatus.BAD_REQUEST
    assert "update_info" in str(raised.value)
    assert all(text in str(raised.value) for text in says)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("road", ["send", "send_packed"])
def test_sound_requests_are_loaded(trainer, road):
    loaded = getattr(trainer, road)()
    assert loaded.keys() == {"weight", "scale"}
    assert torch.equal(loaded["weight"], MATRIX)
    assert torch.equal(loaded["scale"], SCALAR)


def test_handles_may_be_pickled(trainer):
    pickled = in_base64(trainer.handles)
    loaded = trainer.send_as({**trainer.lists, "ipc_handles_pickled": pickled})
    assert torch.equal(loaded["weight"], MATRIX)


def test_handles_may_have_been_lists_on_the_way(trainer):
    listed = [{gpu: [*handle]} for by in trainer.handles for gpu, handle in by.items()]
    assert torch.equal(trainer.send(ipc_handles=listed)["weight"], MATRIX)


def test_lists_may_be_tuples_in_the_process_of_the_engine(trainer):
    lists = {key: tuple(values) for key, values in trainer.lists.items()}
    lists["shapes"] = (torch.Size([2, 3]), torch.Size([]))
    assert torch.equal(trainer.send(**lists)["weight"], MATRIX)
    assert torch.equal(trainer.send_packed(**lists)["weight"], MATRIX)
    assert trainer.send(ipc_handles=tuple(trainer.handles))


def test_nothing_is_a_chunk_too(trainer):
    empty: dict[str, list] = {key: [] for key in (*trainer.lists, "ipc_handles")}
    assert trainer.send_as(empty) == {}


def test_a_chunk_is_parsed_without_a_gpu():
    lists = {"names": ["a"], "dtype_names": ["float32"], "shapes": [[1]]}
    by_gpu = {"another": ("handle",)}
    engine = make_engine(Model(), False)
    info = engine.parse_update_info({**lists, "ipc_handles": [by_gpu]})
    assert info.ipc_handles == [by_gpu]


@pytest.mark.parametrize("info", [5, "abc", [1], None, [{}]])
def test_an_update_is_an_object(trainer, info):
    assert_refused(lambda: trainer.send_as(info), "expected an object, got")


# Of both ways to send.
LISTS = {
    "no list": (dict(names="ab"), "expected a list as 'names', got 'ab'"),
    "nothing": (dict(shapes=None), "expected a list as 'shapes', got None"),
    "a number": (dict(dtype_names=5), "expected a list as 'dtype_names', got 5"),
    "fewer dtypes": (dict(dtype_names=["float32"]), "'dtype_names': 1"),
    "fewer shapes": (dict(shapes=[[]]), "'shapes': 1"),
    "fewer names": (dict(names=["a"]), "'names': 1"),
    "name of another type": (dict(names=["weight", 3]), "tensor 1, 3: expected name"),
    "long name": (dict(names=["n" * 2000, "scale"]), "1 to 1024 characters"),
    "unknown dtype": (dict(dtype_names=["x", "float32"]), "got 'x'"),
    "no dtype of torch": (dict(dtype_names=["load", "float32"]), "got 'load'"),
    "dtype of another type": (dict(dtype_names=[["x"], "float32"]), "got ['x']"),
    "shape of another type": (dict(shapes=["x", []]), "got 'x'"),
    "negative size": (dict(shapes=[[-2, -3], []]), "got [-2, -3]"),
    "huge size": (dict(shapes=[[1 << 70], []]), "expected shape"),
    "fractional size": (dict(shapes=[[2.0, 3], []]), "got [2.0, 3]"),
}


@pytest.mark.parametrize("road", ["send", "send_packed"])
@pytest.mark.parametrize("wrong, says", LISTS.values(), ids=LISTS)
def test_what_is_wrong_with_a_list_is_named(trainer, road, wrong, says):
    assert_refused(lambda: getattr(trainer, road)(**wrong), says)


@pytest.mark.parametrize("road", ["send", "send_packed"])
def test_tensors_are_counted(trainer, road):
    count = MAX_TENSORS + 1
    lists = {"names": [""], "dtype_names": [""], "shapes": [0]}
    many = {key: values * count for key, values in lists.items()}
    assert_refused(lambda: getattr(trainer, road)(**many), f"tensors, got {count}")


UNPICKLED = {
    "no text": 5,
    "a list": ["a"],
    "empty": "",
    "no base64": "!",
    "cut base64": "abc",
    "not ASCII": "ä",
    "no pickle": base64.b64encode(b"garbage").decode(),
    "cut pickle": in_base64([{GPU: (1, 2)}] * 2)[:20],
    "no such module": base64.b64encode(b"cnowhere\nnone\n.").decode(),
    "no such attribute": base64.b64encode(b"cos\nnone\n.").decode(),
    "no such protocol": base64.b64encode(b"\x80\xff.").decode(),
    "a huge size": base64.b64encode(b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f").decode(),
}


@pytest.mark.parametrize("text", UNPICKLED.values(), ids=UNPICKLED)
def test_handles_that_cannot_be_read_are_refused(trainer, text):
    info = {**trainer.lists, "ipc_handles_pickled": text}
    assert_refused(lambda: trainer.send_as(info), "update_info cannot be read: ")


def test_handles_come_once(trainer):
    both = {"ipc_handles_pickled": in_base64(trainer.handles)}
    assert_refused(lambda: trainer.send(**both), "Cannot specify both")


def test_a_pickle_of_nothing_is_refused(trainer):
    info = {**trainer.lists, "ipc_handles_pickled": in_base64(None)}
    assert_refused(lambda: trainer.send_as(info))


@pytest.mark.parametrize("handles", [5, "ab", {}, {"a": 1, "b": 2}])
def test_each_tensor_has_handles(trainer, handles):
    says = "expected a list as 'ipc_handles'"
    assert_refused(lambda: trainer.send(ipc_handles=handles), says)
    pickled = {**trainer.lists, "ipc_handles_pickled": in_base64(handles)}
    assert_refused(lambda: trainer.send_as(pickled), says)


def test_handles_are_counted(trainer):
    fewer = trainer.handles[:1]
    assert_refused(lambda: trainer.send(ipc_handles=fewer), "same size as `names`")


@pytest.mark.parametrize("by_gpu", [None, 3, "ab", []])
def test_handles_are_by_gpu(trainer, by_gpu):
    handles = [trainer.handles[0], by_gpu]
    says = "tensor 1, 'scale': expected handle: an object with one for each GPU"
    assert_refused(lambda: trainer.send(ipc_handles=handles), says)


WRONG_FIELDS = {
    "no class": dict(tensor_cls="torch.Tensor"),
    "class of something else": dict(tensor_cls=int),
    "no sizes": dict(tensor_size=6),
    "negative sizes": dict(tensor_size=(-2, -3)),
    "no strides": dict(tensor_stride=None),
    "negative offset": dict(tensor_offset=-1),
    "huge offset": dict(tensor_offset=1 << 70),
    "no storage": dict(storage_cls=dict),
    "no dtype": dict(dtype="bfloat16"),
    "no bytes": dict(storage_handle="0"),
    "empty": dict(storage_handle=b""),
    "a list": dict(storage_handle=[1]),
    "negative memory": dict(storage_size_bytes=-1),
    "memory of no size": dict(storage_size_bytes=0),
    "fractional place": dict(storage_offset_bytes=1.5),
    "gradient": dict(requires_grad="no"),
    "no counter": dict(ref_counter_handle=None),
    "counter past its file": dict(ref_counter_offset=10_000),
    "counter before its file": dict(ref_counter_offset=-1),
    "short event": dict(event_handle=b"event"),
    "no event": dict(event_handle=None),
    "neither true nor false": dict(event_sync_required=None),
}


@pytest.mark.parametrize("wrong", WRONG_FIELDS.values(), ids=WRONG_FIELDS)
def test_what_is_wrong_with_a_handle_is_named(trainer, wrong):
    (field,) = wrong
    handle = changed(trainer.handles[0][GPU], **wrong)
    handles = [{GPU: handle}, trainer.handles[1]]
    says = ("tensor 0, 'weight': expected handle: ", f" as {field}, got ")
    assert_refused(lambda: trainer.send(ipc_handles=handles), *says)
    handle = changed(trainer.of_buffer[GPU], **wrong)
    says = ("expected a handle of the buffer: ", f" as {field}, got ")
    assert_refused(lambda: trainer.send_packed(ipc_handles={GPU: handle}), *says)


@pytest.mark.parametrize("handle", [3, None, "ab", (1, 2), [0] * 14])
def test_a_handle_has_the_fields_that_torch_gives_it(trainer, handle):
    says = f"the {len(FIELDS)} fields that torch's reduce_tensor gives, got"
    handles = [{GPU: handle}, trainer.handles[1]]
    assert_refused(lambda: trainer.send(ipc_handles=handles), says)
    assert_refused(lambda: trainer.send_packed(ipc_handles={GPU: handle}), says)


def test_a_tensor_without_memory_has_no_elements(trainer):
    """torch would give it memory that nobody wrote."""
    without = changed(trainer.handles[0][GPU], storage_handle=None)
    handles = [{GPU: without}, trainer.handles[1]]
    assert_refused(lambda: trainer.send(ipc_handles=handles), "memory for a tensor of")


def test_sizes_have_strides(trainer):
    flat = changed(trainer.handles[0][GPU], tensor_stride=(1,))
    handles = [{GPU: flat}, trainer.handles[1]]
    assert_refused(lambda: trainer.send(ipc_handles=handles), "as many strides")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(dtype_names=["float16", "float32"]), "torch.bfloat16, as its handle"),
        (dict(shapes=[[3, 2], []]), "[2, 3], as its handle, got [3, 2]"),
    ],
)
def test_a_handle_is_of_the_tensor_that_is_described(trainer, wrong, says):
    assert_refused(lambda: trainer.send(**wrong), says)


def test_a_handle_that_cuda_refuses(trainer):
    says = "the handle of a torch.bfloat16 tensor of shape [2, 3] cannot be opened"
    unknown = changed(trainer.handles[0][GPU], storage_handle=b"unknown")
    handles = [{GPU: unknown}, trainer.handles[1]]
    assert_refused(lambda: trainer.send(ipc_handles=handles), says)


def test_a_buffer_that_cuda_refuses(trainer):
    unknown = changed(trainer.of_buffer[GPU], storage_handle=b"unknown")
    says = "the handle of a torch.uint8 tensor of shape [32] cannot be opened"
    assert_refused(lambda: trainer.send_packed(ipc_handles={GPU: unknown}), says)


def test_memory_that_cannot_be_mapped_is_no_fault_of_the_client(trainer, monkeypatch):
    def fails(*handle: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.multiprocessing.reductions, "rebuild_cuda_tensor", fails)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.send()


def test_the_handle_of_another_gpu_is_none_for_this_one(trainer):
    others = [{"another": each[GPU]} for each in trainer.handles]
    with pytest.raises(ValueError, match="not found for GPU UUID"):
        trainer.send(ipc_handles=others)
    other = {"another": trainer.of_buffer[GPU]}
    assert_refused(lambda: trainer.send_packed(ipc_handles=other), f"GPU {GPU}")


SIZES = {
    "no list": (5, "expected a list as 'tensor_sizes', got 5"),
    "nothing": (None, "tensor_sizes"),
    "fewer": ([12], "'tensor_sizes': 1"),
    "text": (["12", 4], "got '12'"),
    "negative": ([-12, 4], "got -12"),
    "another": ([8, 4], "expected size: 12 bytes, by dtype and shape, got 8"),
    "huge": ([1 << 70, 4], "expected size: 12 bytes"),
}


@pytest.mark.parametrize("sizes, says", SIZES.values(), ids=SIZES)
def test_sizes_are_those_of_the_tensors(trainer, sizes, says):
    assert_refused(lambda: trainer.send_packed(tensor_sizes=sizes), says)


def test_tensors_lie_in_the_buffer(trainer):
    wrong = dict(shapes=[[2, 3], [6]], tensor_sizes=[12, 24])
    says = "in a buffer of 32 bytes, got 'bytes 12 to 36'"
    assert_refused(lambda: trainer.send_packed(**wrong), says)


def test_tensors_may_fill_the_buffer(trainer):
    filled = dict(shapes=[[2, 3], [5]], tensor_sizes=[12, 20])
    assert trainer.send_packed(**filled)["scale"].shape == (5,)


def test_tensors_begin_where_a_view_of_their_dtype_may(trainer):
    wrong = dict(
        dtype_names=["uint8", "float32"], shapes=[[3], []], tensor_sizes=[3, 4]
    )
    says = "tensor 1, 'scale': expected place: a multiple of 4"
    assert_refused(lambda: trainer.send_packed(**wrong), says)


@pytest.mark.parametrize("handles", [5, "ab", [], [{}, {}]])
def test_a_buffer_has_one_handle_for_each_gpu(trainer, handles):
    assert_refused(lambda: trainer.send_packed(ipc_handles=handles), "ipc_handles'")


def test_a_buffer_is_bytes(trainer):
    says = "uint8 in one dimension, got 'torch.bfloat16 of shape [2, 3]'"
    matrix = trainer.handles[0]
    assert_refused(lambda: trainer.send_packed(ipc_handles=matrix), says)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.just(GPU), inner, max_size=1)
    ),
    max_leaves=5,
)
OF_EACH = st.lists(ANYTHING, min_size=2, max_size=2)
SAID = ("names", "dtype_names", "shapes", "tensor_sizes", "ipc_handles")


# The first text of a process waits for a table of all characters.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.booleans(),
    st.dictionaries(st.sampled_from(SAID), OF_EACH | ANYTHING, max_size=2),
    st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=2),
)
def test_whatever_is_sent_is_loaded_or_refused(is_packed, wrong, fields):
    with shared_memory_of_a_gpu() as gpu:
        trainer = Trainer(gpu)
        by_gpu = trainer.of_buffer if is_packed else trainer.handles[0]
        by_gpu[GPU] = changed(by_gpu[GPU], **fields)
        try:
            (trainer.send_packed if is_packed else trainer.send)(**wrong)
        except Exception as error:
            assert RpcFailure.of(error).status == HTTPStatus.BAD_REQUEST
            assert len(str(error)) < 500
        else:
            assert trainer.model.loaded["weight"].shape == (2, 3)
