# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whatever a trainer sends, the outcome is its weights or an error, never a mixture.

A scenario is an order of the checkpoint's tensors, a chunking, a commit policy and a
few disturbances. After it either the sync succeeded and the model is bit-identical to
a cold load of what was sent, or it failed and the model serves what it served before,
or is fenced until a complete sync succeeds. `RELOAD_EXAMPLES` sets how many scenarios
are tried.
"""

import dataclasses
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import pytest
import regex as re
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints import CASES, Sizes, chunks
from tests.harness import memory, stand_ins
from tests.harness.models import Built, build
from tests.harness.snapshot import Snapshot, assert_same, differences, snapshot
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    reload_status,
)

Tensors = dict[str, torch.Tensor]
Stream = list[tuple[str, torch.Tensor]]

EXAMPLES = int(os.environ.get("RELOAD_EXAMPLES", "60"))
BASE_SEED, NEW_SEED, OTHER_SEED = 1, 2, 3
SMALL = Sizes(
    layers=2,
    experts=3,
    hidden=256,
    intermediate=128,
    heads=4,
    kv_heads=2,
    head_dim=64,
    vocab=128,
)
NAMES = (
    "qwen3_moe-fp8_block",
    "qwen3_moe-bf16",
    "qwen3_moe-compressed_channel",
)


# What can go wrong on the way.


class Damage(Enum):
    """What is done to a tensor before it is sent."""

    NAN_SCALE = "nan"
    INFINITE_SCALE = "inf"
    NEGATIVE_SCALE = "-0.5"
    ZERO_SCALE = "0.0"
    SHORT = "short"
    LONG = "long"
    FLAT = "flat"
    WRONG_TYPE = "wrong type"

    @property
    def of_scales(self) -> bool:
        return self.name.endswith("_SCALE")

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.of_scales:
            return _with_one_value(tensor, float(self.value))
        if self is Damage.SHORT:
            return tensor[: tensor.shape[0] // 2].clone()
        if self is Damage.LONG:
            return torch.cat([tensor, tensor[:1]])
        if self is Damage.FLAT:
            return tensor.reshape(1, -1)
        wrong = torch.bfloat16 if tensor.itemsize == 1 else torch.int8
        return tensor.to(wrong)


def _with_one_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    damaged = tensor.clone()
    damaged.view(-1)[-1] = value
    return damaged


@dataclass(frozen=True)
class Drop:
    """Never send a tensor, or any tensor of its module."""

    which: int
    whole_module: bool

    def apply(self, stream: Stream, _other: Tensors) -> Stream:
        gone, _ = stream[self.which % len(stream)]
        if self.whole_module:
            return [s for s in stream if module_of(s[0]) != module_of(gone)]
        return [s for s in stream if s[0] != gone]


@dataclass(frozen=True)
class Repeat:
    """Send a tensor once more, somewhere, with the same values or others."""

    which: int
    where: int
    equal: bool

    def apply(self, stream: Stream, other: Tensors) -> Stream:
        name, tensor = stream[self.which % len(stream)]
        again = tensor if self.equal else other[name]
        where = self.where % (len(stream) + 1)
        return [*stream[:where], (name, again), *stream[where:]]


@dataclass(frozen=True)
class Spoil:
    """Damage one tensor, or a scale where only scales can be damaged so."""

    which: int
    damage: Damage

    def apply(self, stream: Stream, _other: Tensors) -> Stream:
        scales = [i for i, (name, _) in enumerate(stream) if is_scale(name)]
        if self.damage is Damage.ZERO_SCALE:  # test_scales tells of the others
            scales = [i for i in scales if "weight" in stream[i][0]]
        places = scales if self.damage.of_scales else [*range(len(stream))]
        places = [i for i in places if self.damage.of_scales or stream[i][1].dim()]
        if not places:
            return stream
        place = places[self.which % len(places)]
        name, tensor = stream[place]
        spoilt = (name, self.damage.apply(tensor))
        return [*stream[:place], spoilt, *stream[place + 1 :]]


Disturbance = Drop | Repeat | Spoil


@dataclass(frozen=True)
class Scenario:
    """One sync.

    Attributes:
        policy: the value of VLLM_RELOAD_COMMIT.
        order: seed of the order; 0 is the checkpoint's.
        bytes_per_chunk: size of the chunks.
        disturbances: applied to the stream one after the other.
        abandoned: tensors of another checkpoint, sent to a sync that is not finished.
        dies_after: tensors after which the caller's iterator raises; None is never.
        closes: whether the caller finishes a sync that failed.

    """

    policy: str = "layer"
    order: int = 0
    bytes_per_chunk: int = 1 << 20
    disturbances: list[Disturbance] = field(default_factory=list)
    abandoned: int = 0
    dies_after: int | None = None
    closes: bool = True


INDEX = st.integers(0, 999)
DISTURBANCES = st.one_of(
    st.builds(Repeat, INDEX, INDEX, st.booleans()),
    st.builds(Drop, INDEX, st.booleans()),
    st.builds(Spoil, INDEX, st.sampled_from(Damage)),
)
SCENARIOS = st.builds(
    Scenario,
    policy=st.sampled_from(["layer", "model"]),
    order=st.integers(0, 1 << 16),
    bytes_per_chunk=st.sampled_from([1 << 20, 1 << 18, 1 << 14, 1]),
    disturbances=st.lists(DISTURBANCES, max_size=3),
    abandoned=st.one_of(st.just(0), st.integers(0, 80)),
    dies_after=st.one_of(st.none(), st.none(), st.integers(0, 80)),
    closes=st.booleans(),
)


# What must come of it, from the checkpoint's names alone.


def is_scale(name: str) -> bool:
    return re.search(r"_scale(_inv)?$", name) is not None


def module_of(name: str) -> str:
    """The vLLM module that a checkpoint's tensor is loaded into."""
    name = re.sub(r"\.experts\..*", ".experts.", name)
    return re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", name).rpartition(".")[0]


def refused(stream: Stream, checkpoint: Tensors, owes_all: bool) -> str:
    """Why a sync of this stream must not succeed; "" where it may."""
    last = dict(stream)
    for name, tensor in stream:
        good = checkpoint[name]
        floats = {torch.bfloat16, torch.float32}
        if tensor.dtype != good.dtype and not {tensor.dtype, good.dtype} <= floats:
            return f"{name} has the wrong type"
        if tensor.shape != good.shape:
            return f"{name} has the wrong shape"
    for name in filter(is_scale, last):
        if not (torch.isfinite(last[name]) & (last[name] > 0)).all():
            return f"{name} is invalid"
    for module in {module_of(name) for name in checkpoint}:
        owed = {name for name in checkpoint if module_of(name) == module}
        lacking = owed - last.keys()
        if lacking and (owes_all or lacking != owed):
            return f"{sorted(lacking)[0]} is missing"
    return ""


def is_undisturbed(stream: Stream, checkpoint: Tensors) -> bool:
    """Whether a stream brings one value of each tensor, however often."""
    seen: Tensors = {}
    return all(seen.setdefault(name, t) is t for name, t in stream)


# The model under test.


class Died(Exception):
    """Raised by the caller's iterator."""


class FromMemory(BaseModelLoader):
    """Loads a model, as from disk, from tensors."""

    def __init__(self, built: Built, tensors: Tensors):
        super().__init__(built.vllm_config.load_config)
        self._tensors = tensors

    def download_model(self, model_config) -> None:
        pass

    def load_weights(self, model: torch.nn.Module, model_config) -> None:
        model.load_weights(iter(self._tensors.items()))


class Trainer:
    """A model that serves, and everything that is sent to it."""

    def __init__(self, make: Callable[[], Built], checkpoints: dict[int, Tensors]):
        self._make = make
        self.checkpoints = checkpoints
        self.built = make()
        self.base = snapshot(self.built.model)
        largest = max(t.nbytes for t in checkpoints[BASE_SEED].values())
        self._bucket = torch.empty(4 * largest + (1 << 16), dtype=torch.uint8)

    def start(self) -> None:
        """Be sure to serve the first checkpoint; a new model if the last one broke."""
        serves = reload_status(self.built.model).state == "serving"
        if not serves or any(differences(snapshot(self.built.model), self.base)):
            self.built = self._make()

    def stream(self, scenario: Scenario) -> Stream:
        """What is sent: the new checkpoint, reordered and disturbed."""
        stream = [*self.checkpoints[NEW_SEED].items()]
        if scenario.order:
            random.Random(scenario.order).shuffle(stream)
        for disturbance in scenario.disturbances:
            if stream:
                stream = disturbance.apply(stream, self.checkpoints[OTHER_SEED])
        return stream

    def send(self, stream: Stream, size: int, dies_after: int | None = None) -> None:
        """Load a stream through one reused bucket."""
        sent = _Countdown(dies_after)
        for chunk in chunks(stream, size, self._bucket):
            watched = sent.watch(chunk)
            # Either form comes: a list is copied in batches, where there are any.
            self.built.model.load_weights(list(watched) if size % 2 else watched)

    def sync(self, stream: Stream, size: int = 1 << 20) -> None:
        self.open()
        self.send(stream, size)
        self.finish()

    def open(self) -> None:
        initialize_layerwise_reload(self.built.model)

    def finish(self) -> None:
        model_config = self.built.vllm_config.model_config
        finalize_layerwise_reload(self.built.model, model_config)

    def cold_load(self, tensors: Tensors) -> Snapshot:
        """What a fresh model of these tensors holds."""
        vllm_config = self.built.vllm_config
        context = vllm_config.compilation_config.static_forward_context
        saved = dict(context)
        context.clear()
        try:
            loader = FromMemory(self.built, tensors)
            return snapshot(loader.load_model(vllm_config, vllm_config.model_config))
        finally:
            context.clear()
            context.update(saved)

    @property
    def serving(self) -> Snapshot:
        """What the model holds, without what an open sync takes of it."""
        found = snapshot(self.built.model)
        return {k: v for k, v in found.items() if not k.startswith("load_weights.")}

    @property
    def addresses(self) -> dict[str, int]:
        model = self.built.model
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        return {name: tensor.data_ptr() for name, tensor in tensors.items()}


class _Countdown:
    """Watches what is sent, and dies after so many tensors."""

    def __init__(self, left: int | None):
        self._left = left

    def watch(self, chunk: Stream) -> Iterator[tuple[str, torch.Tensor]]:
        for item in chunk:
            if self._left is not None:
                if self._left == 0:
                    raise Died
                self._left -= 1
            yield item


@pytest.fixture(scope="module")
def trainers(checkpoint, rank) -> Iterator[Callable[[str], Trainer]]:
    """Give a case's trainer; its model is built once."""
    made: dict[str, Trainer] = {}

    def trainer(name: str) -> Trainer:
        if name not in made:
            case = dataclasses.replace(CASES[name], sizes=SMALL)
            seeds = (BASE_SEED, NEW_SEED, OTHER_SEED)
            tensors = {seed: dict(case.tensors(seed)) for seed in seeds}
            folder = checkpoint(case, BASE_SEED)
            made[name] = Trainer(partial(build, case, folder), tensors)
        return made[name]

    dtype = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch, memory.nan_memory():
        stand_ins.install(patch)
        yield trainer
    torch.set_default_dtype(dtype)


def run(trainer: Trainer, scenario: Scenario) -> None:
    """Play a scenario and judge its outcome."""
    trainer.start()
    addresses = trainer.addresses
    before = trainer.base
    stream = trainer.stream(scenario)
    error: BaseException | None = None
    trainer.open()
    if scenario.abandoned:
        others = [*trainer.checkpoints[OTHER_SEED].items()][: scenario.abandoned]
        trainer.send(others, scenario.bytes_per_chunk)
        trainer.open()
        _judge_untouched(trainer, before, scenario.policy)
    owes_all = reload_status(trainer.built.model).fenced
    try:
        trainer.send(stream, scenario.bytes_per_chunk, scenario.dies_after)
        if scenario.policy == "model" and not owes_all:
            assert_same(trainer.serving, before)
        trainer.finish()
    except (WeightSyncError, Died) as raised:
        error = raised
    died = scenario.dies_after is not None and scenario.dies_after < len(stream)
    if error is None:
        assert not died
        assert (
            why := refused(stream, trainer.checkpoints[NEW_SEED], owes_all)
        ) == "", why
        merged = trainer.checkpoints[BASE_SEED] | dict(stream)
        assert_same(snapshot(trainer.built.model), trainer.cold_load(merged))
        assert reload_status(trainer.built.model).state == "serving"
    else:
        _judge_failure(trainer, scenario, stream, error, died, owes_all)
    assert trainer.addresses == addresses
    trainer.sync([*trainer.checkpoints[BASE_SEED].items()])
    assert_same(snapshot(trainer.built.model), trainer.base)
    assert trainer.addresses == addresses


def _judge_failure(
    trainer: Trainer,
    scenario: Scenario,
    stream: Stream,
    error: BaseException,
    died: bool,
    owes_all: bool,
) -> None:
    checkpoint = trainer.checkpoints[NEW_SEED]
    if not died and is_undisturbed(stream, checkpoint):
        assert refused(stream, checkpoint, owes_all) != "", error
    if isinstance(error, Died):
        assert died
    if scenario.closes:
        with suppress(WeightSyncError):
            trainer.finish()
    if not owes_all:
        _judge_untouched(trainer, trainer.base, scenario.policy)
    else:
        assert reload_status(trainer.built.model).fenced


def _judge_untouched(trainer: Trainer, before: Snapshot, policy: str) -> None:
    """A failed sync left the old weights, or is fenced."""
    fenced = reload_status(trainer.built.model).fenced
    assert not (fenced and policy == "model")
    if not fenced:
        assert_same(trainer.serving, before)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", NAMES)
def test_no_scenario_corrupts_silently(name, trainers):
    trainer = trainers(name)

    @settings(
        max_examples=max(1, EXAMPLES // len(NAMES)),
        deadline=None,
        database=None,
        derandomize="RELOAD_EXAMPLES" not in os.environ,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(SCENARIOS)
    def play(scenario: Scenario) -> None:
        with pytest.MonkeyPatch.context() as patch, trainer.built.worker_context():
            patch.setenv("VLLM_RELOAD_COMMIT", scenario.policy)
            run(trainer, scenario)

    play()


@pytest.mark.parametrize("name", NAMES)
def test_oracle_is_a_cold_load(name, trainers, checkpoint):
    """The oracle agrees with a model built from disk."""
    trainer = trainers(name)
    assert_same(trainer.cold_load(trainer.checkpoints[BASE_SEED]), trainer.base)


def test_oracle_tells_wrong_weights(trainers):
    """A model that holds one other tensor is not identical to the oracle's."""
    trainer = trainers(NAMES[0])
    tensors = dict(trainer.checkpoints[BASE_SEED])
    name = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"
    tensors[name] = trainer.checkpoints[OTHER_SEED][name]
    with pytest.raises(AssertionError, match="w13_weight_scale_inv"):
        assert_same(trainer.cold_load(tensors), trainer.base)


def test_static_scales_in_any_order(trainers):
    trainer = trainers("qwen3_moe-fp8_tensor_static")
    with pytest.MonkeyPatch.context() as patch, trainer.built.worker_context():
        patch.setenv("VLLM_RELOAD_COMMIT", "layer")
        run(trainer, Scenario(order=64809, bytes_per_chunk=1 << 14))
