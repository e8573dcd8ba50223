# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The FP8 MoE emulation: its numbers, and when it is chosen.

Shape suffixes: M tokens, T top-k choices, E experts, H hidden, I intermediate,
O rows of w13 (gate above up).
"""

import dataclasses
from dataclasses import dataclass
from logging.handlers import BufferingHandler
from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch

import vllm.logger
from tests.kernels.fp8_reference import (
    BLOCK_128,
    CHANNEL,
    FORMATS,
    TENSOR,
    Fp8Matrix,
    ScaleFormat,
    relative_error,
)
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.experts import (
    cpu_moe,
    fp8_emulation_moe,
)
from vllm.model_executor.layers.fused_moe.experts.fp8_emulation_moe import (
    Fp8EmulationExperts,
)
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
from vllm.model_executor.layers.fused_moe.oracle import fp8 as oracle
from vllm.model_executor.layers.quantization.utils import quant_utils as keys
from vllm.platforms import current_platform

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="emulates FP8 on CPUs only"
)
EMULATION = (oracle.Fp8MoeBackend.EMULATION, Fp8EmulationExperts)


@pytest.fixture(autouse=True)
def config():
    torch.manual_seed(0)
    with set_current_vllm_config(VllmConfig()):
        yield


@dataclass(frozen=True)
class Expert:
    """The three projections of an expert, and the biases of gate, up and down."""

    gate: Fp8Matrix
    up: Fp8Matrix
    down: Fp8Matrix
    biases: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    @classmethod
    def random(cls, hidden: int, inter: int, scale_format: ScaleFormat) -> Self:
        gate, up, down = (
            Fp8Matrix.random(*shape, scale_format)
            for shape in ((inter, hidden), (inter, hidden), (hidden, inter))
        )
        biases = tuple(torch.randn(n).bfloat16() for n in (inter, inter, hidden))
        return cls(gate, up, down, biases)


@dataclass(frozen=True)
class Experts:
    """A layer of experts, as lists for the reference and stacked for the kernel."""

    experts: tuple[Expert, ...]
    scale_format: ScaleFormat

    @classmethod
    def random(
        cls,
        scale_format: ScaleFormat = BLOCK_128,
        count: int = 6,
        hidden: int = 256,
        inter: int = 128,
    ) -> Self:
        experts = (Expert.random(hidden, inter, scale_format) for _ in range(count))
        return cls(tuple(experts), scale_format)

    @property
    def w13_EOH(self) -> torch.Tensor:
        return torch.stack(
            [torch.cat([e.gate.weight, e.up.weight]) for e in self.experts]
        )

    @property
    def w2_EHI(self) -> torch.Tensor:
        return torch.stack([e.down.weight for e in self.experts])

    @property
    def w13_scale(self) -> torch.Tensor:
        scales = ((e.gate.scale, e.up.scale) for e in self.experts)
        return torch.stack([torch.cat([*map(torch.atleast_1d, s)]) for s in scales])

    @property
    def w2_scale(self) -> torch.Tensor:
        return torch.stack([e.down.scale for e in self.experts])

    def on_rank(self, rank: int, ranks: int) -> tuple[Self, torch.Tensor]:
        """Every `ranks`-th expert, and the expert map."""
        local = range(rank, len(self.experts), ranks)
        expert_map = torch.full((len(self.experts),), -1, dtype=torch.int32)
        expert_map[list(local)] = torch.arange(len(local), dtype=torch.int32)
        mine = tuple(self.experts[e] for e in local)
        return dataclasses.replace(self, experts=mine), expert_map


@dataclass(frozen=True)
class Routing:
    """Tokens and where they go."""

    x_MH: torch.Tensor
    weights_MT: torch.Tensor
    ids_MT: torch.Tensor

    @classmethod
    def random(cls, tokens: int, experts: int = 6, topk: int = 2, hidden: int = 256):
        ids = torch.stack([torch.randperm(experts)[:topk] for _ in range(tokens)])
        x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
        return cls(x, torch.rand(tokens, topk), ids.int())


def moe_config(**changes: Any) -> FusedMoEConfig:
    fields = dict(
        num_experts=6,
        experts_per_token=2,
        hidden_dim=256,
        intermediate_size=128,
        num_local_experts=6,
        num_logical_experts=6,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
    )
    return FusedMoEConfig(**(fields | changes))


def make_kernel(
    experts: Experts, biases: bool = False, **options: Any
) -> FusedMoEKernel:
    """Build what `Fp8MoEMethod` builds after loading."""
    block = experts.scale_format.block
    fields = dict(
        w1_scale=experts.w13_scale,
        w2_scale=experts.w2_scale,
        a1_scale=None,
        a2_scale=None,
        block_shape=list(block) if block else None,
    )
    if biases:
        all_biases = [e.biases for e in experts.experts]
        fields["w1_bias"] = torch.stack([torch.cat(b[:2]) for b in all_biases])
        fields["w2_bias"] = torch.stack([b[2] for b in all_biases])
    backend, experts_cls = EMULATION
    quant_config = oracle.make_fp8_moe_quant_config(backend, **(fields | options))
    return oracle.make_fp8_moe_kernel(quant_config, moe_config(), experts_cls, backend)


def apply(
    kernel: FusedMoEKernel,
    w13_EOH: torch.Tensor,
    w2_EHI: torch.Tensor,
    routing: Routing,
    expert_map: torch.Tensor | None = None,
    activation: MoEActivation = MoEActivation.SILU,
    on_input: bool = False,
) -> torch.Tensor:
    """Call the kernel as `Fp8MoEMethod` does; [M, H]."""
    return kernel.apply(
        routing.x_MH,
        w13_EOH,
        w2_EHI,
        routing.weights_MT,
        routing.ids_MT,
        activation=activation,
        global_num_experts=6,
        expert_map=expert_map,
        apply_router_weight_on_input=on_input,
    )


def run(experts: Experts, routing: Routing, **call: Any) -> torch.Tensor:
    """Build a kernel for these experts and call it once; [M, H]."""
    return apply(make_kernel(experts), experts.w13_EOH, experts.w2_EHI, routing, **call)


def reference(
    experts: Experts,
    routing: Routing,
    act=torch.nn.functional.silu,
    limit: float = float("inf"),
    biases: bool = False,
) -> torch.Tensor:
    """The same in float64, token by token and choice by choice; [M, H]."""
    total_MH = torch.zeros_like(routing.x_MH, dtype=torch.float64)
    for m, x_H in enumerate(routing.x_MH.double()):
        for weight, e in zip(routing.weights_MT[m], routing.ids_MT[m], strict=True):
            expert = experts.experts[e]
            gate_b, up_b, down_b = (b.double() * biases for b in expert.biases)
            gate_I = expert.gate.dequantized() @ x_H + gate_b
            up_I = expert.up.dequantized() @ x_H + up_b
            hidden_I = act(gate_I.clamp(max=limit)) * up_I.clamp(-limit, limit)
            down_H = expert.down.dequantized() @ hidden_I + down_b
            total_MH[m] += weight.double() * down_H
    return total_MH


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("hidden, inter", [(256, 128), (200, 96)])
@pytest.mark.parametrize("scale_format", FORMATS, ids=str)
def test_close_to_float64(scale_format, hidden, inter, tokens):
    experts = Experts.random(scale_format, hidden=hidden, inter=inter)
    routing = Routing.random(tokens, hidden=hidden)
    got_MH = run(experts, routing)
    assert got_MH.dtype == torch.bfloat16
    assert relative_error(got_MH, reference(experts, routing)) < 1e-2


def test_one_scale_for_gate_and_up():
    """Quantisation methods merge the two scales of a per-tensor checkpoint."""
    experts, routing = Experts.random(TENSOR), Routing.random(5)
    for expert in experts.experts:
        expert.up.scale.copy_(expert.gate.scale)
    merged = make_kernel(experts, w1_scale=experts.w13_scale[:, 0])
    got_MH = apply(merged, experts.w13_EOH, experts.w2_EHI, routing)
    assert relative_error(got_MH, reference(experts, routing)) < 1e-2


@pytest.mark.parametrize(
    "activation, act",
    [
        (MoEActivation.GELU, torch.nn.GELU()),
        (MoEActivation.GELU_TANH, torch.nn.GELU("tanh")),
    ],
    ids=str,
)
def test_other_activations(activation, act):
    experts, routing = Experts.random(), Routing.random(5)
    got_MH = run(experts, routing, activation=activation)
    assert relative_error(got_MH, reference(experts, routing, act)) < 1e-2


def test_biases():
    experts, routing = Experts.random(), Routing.random(5)
    kernel = make_kernel(experts, biases=True)
    got_MH = apply(kernel, experts.w13_EOH, experts.w2_EHI, routing)
    assert relative_error(got_MH, reference(experts, routing, biases=True)) < 1e-2


def test_swiglu_limit():
    experts, routing = Experts.random(), Routing.random(5)
    kernel = make_kernel(experts, swiglu_limit=0.5)
    got_MH = apply(kernel, experts.w13_EOH, experts.w2_EHI, routing)
    want_MH = reference(experts, routing, limit=0.5)
    assert relative_error(want_MH, reference(experts, routing)) > 0.5
    assert relative_error(got_MH, want_MH) < 1e-2


def test_router_weight_on_input_is_applied_once():
    experts, routing = Experts.random(), Routing.random(5, topk=1)
    weighted = routing.x_MH * routing.weights_MT.bfloat16()
    on_input = Routing(weighted, torch.ones(5, 1), routing.ids_MT)
    got_MH = run(experts, routing, on_input=True)
    assert relative_error(got_MH, reference(experts, on_input)) < 1e-2


def test_router_weights_are_applied_in_float32():
    """Two experts of opposite sign: what is left is what bfloat16 would round off."""
    expert = Expert.random(256, 128, BLOCK_128)
    minus = dataclasses.replace(expert.down, scale=-expert.down.scale)
    opposite = dataclasses.replace(expert, down=minus)
    experts = Experts((expert, opposite), BLOCK_128)
    x_MH = torch.randn(3, 256, dtype=torch.bfloat16)
    ids_MT = torch.tensor([[0, 1]] * 3)
    weights_MT = torch.tensor([[0.5 + 2.0**-12, 0.5]] * 3)
    got_MH = run(experts, Routing(x_MH, weights_MT, ids_MT))
    whole_MH = run(experts, Routing(x_MH, torch.tensor([[1.0, 0.0]] * 3), ids_MT))
    assert torch.equal(got_MH, whole_MH * 2.0**-12)


def test_ranks_of_expert_parallelism_add_up():
    experts, routing = Experts.random(), Routing.random(9)
    total_MH = torch.zeros_like(routing.x_MH, dtype=torch.float64)
    for rank in range(2):
        local, expert_map = experts.on_rank(rank, ranks=2)
        # Experts that are elsewhere must not even be looked up.
        total_MH += run(local, routing, expert_map=expert_map).double()
    assert relative_error(total_MH, reference(experts, routing)) < 1e-2


def test_tokens_without_local_experts_get_zeros():
    experts = Experts.random()
    local, expert_map = experts.on_rank(0, ranks=2)
    routing = Routing.random(3)
    routing.ids_MT.copy_(torch.tensor([[1, 3], [5, 1], [3, 5]]))
    assert not run(local, routing, expert_map=expert_map).any()


@pytest.mark.parametrize("mapped", [False, True])
def test_choice_of_no_expert_contributes_nothing(mapped):
    experts, routing = Experts.random(), Routing.random(4)
    first = dataclasses.replace(
        routing,
        weights_MT=routing.weights_MT[:, :1],
        ids_MT=routing.ids_MT[:, :1],
    )
    routing.ids_MT[:, 1] = -1
    expert_map = torch.arange(6) if mapped else None
    got_MH = run(experts, routing, expert_map=expert_map)
    assert torch.equal(got_MH, run(experts, first))


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_nan_scale_shows_in_the_tokens_of_its_expert_only(projection):
    experts = Experts.random()
    getattr(experts.experts[2], projection).scale[0, 0] = float("nan")
    routing = Routing.random(12)
    poisoned_M = (routing.ids_MT == 2).any(-1)
    assert poisoned_M.any() and not poisoned_M.all()
    got_MH = run(experts, routing)
    assert torch.equal(got_MH.isnan().any(-1), poisoned_M)


def test_only_experts_with_tokens_are_dequantised_one_at_a_time(monkeypatch):
    shapes = []
    dequantize = fp8_emulation_moe.dequantize_fp8

    def spy(weight: torch.Tensor, *args: Any) -> torch.Tensor:
        shapes.append(tuple(weight.shape))
        return dequantize(weight, *args)

    monkeypatch.setattr(fp8_emulation_moe, "dequantize_fp8", spy)
    routing = Routing.random(4)
    routing.ids_MT.copy_(torch.tensor([[1, 4]] * 4))
    run(Experts.random(), routing)
    assert shapes == [(256, 256), (256, 128)] * 2


def test_loading_keeps_the_checkpoint_format():
    experts = Experts.random()
    tensors = experts.w13_EOH, experts.w2_EHI, experts.w13_scale, experts.w2_scale
    layer = SimpleNamespace(weight_block_size=[128, 128])
    kept = oracle.convert_to_fp8_moe_kernel_format(
        oracle.Fp8MoeBackend.EMULATION, layer, *tensors, None, None
    )
    assert all(a is b for a, b in zip(kept, tensors, strict=True))


def test_weights_are_left_alone_and_read_anew_at_each_call():
    first, second, routing = Experts.random(), Experts.random(), Routing.random(5)
    w13, w2 = first.w13_EOH, first.w2_EHI
    scales = dict(w1_scale=first.w13_scale, w2_scale=first.w2_scale)
    kernel = make_kernel(first, **scales)
    assert torch.equal(apply(kernel, w13, w2, routing), run(first, routing))
    assert torch.equal(w13.view(torch.uint8), first.w13_EOH.view(torch.uint8))
    assert torch.equal(w2.view(torch.uint8), first.w2_EHI.view(torch.uint8))

    w13.copy_(second.w13_EOH)
    w2.copy_(second.w2_EHI)
    scales["w1_scale"].copy_(second.w13_scale)
    scales["w2_scale"].copy_(second.w2_scale)
    assert torch.equal(apply(kernel, w13, w2, routing), run(second, routing))


def test_torch_compile_traces_it():
    experts, routing = Experts.random(), Routing.random(5)
    kernel, weights = make_kernel(experts), (experts.w13_EOH, experts.w2_EHI)
    compiled = torch.compile(apply, fullgraph=True, backend="eager")
    got_MH = compiled(kernel, *weights, routing)
    assert torch.equal(got_MH, run(experts, routing))


SCHEMES = {
    "block": (keys.kFp8Static128BlockSym, keys.kFp8Dynamic128Sym),
    "refined_block": (keys.create_fp8_quant_key(True, keys.GroupShape(64, 64)),) * 2,
    "tensor": (keys.kFp8StaticTensorSym, keys.kFp8DynamicTensorSym),
    "static_tensor": (keys.kFp8StaticTensorSym, keys.kFp8StaticTensorSym),
    "channel": (keys.kFp8StaticChannelSym, keys.kFp8DynamicTokenSym),
}


@pytest.fixture
def support_native(monkeypatch):
    """Return a switch for whether the native FP8 experts fit this machine."""

    def switch(supported: bool) -> None:
        for experts in (cpu_moe.CPUExpertsFp8, cpu_moe.CPUExpertsFp8W8A8):
            monkeypatch.setattr(experts, "_supports_current_device", lambda: supported)

    return switch


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_chosen_where_nothing_native_fits(support_native, scheme):
    support_native(False)
    assert oracle.select_fp8_moe_backend(moe_config(), *scheme) == EMULATION


def test_steps_aside_for_native_experts(support_native):
    support_native(True)
    backend, experts = oracle.select_fp8_moe_backend(
        config=moe_config(),
        weight_key=keys.kFp8Static128BlockSym,
        activation_key=keys.kFp8Dynamic128Sym,
        allow_vllm_cutlass=True,
    )
    assert backend is oracle.Fp8MoeBackend.CPU_W8A8
    assert experts is cpu_moe.CPUExpertsFp8W8A8


def not_fp8() -> tuple[FusedMoEConfig, keys.QuantKey]:
    return moe_config(), keys.kMxfp8Static


def interleaved() -> tuple[FusedMoEConfig, keys.QuantKey]:
    return moe_config(activation=MoEActivation.SWIGLUOAI), keys.kFp8Static128BlockSym


@pytest.mark.parametrize("case", [not_fp8, interleaved])
def test_what_it_cannot_serve_is_not_its(support_native, case):
    support_native(False)
    config, weight_key = case()
    found = oracle.select_fp8_moe_backend(config, weight_key, keys.kFp8Dynamic128Sym)
    assert found == (oracle.Fp8MoeBackend.NONE, None)


def test_other_platforms_keep_their_answer(support_native, monkeypatch):
    support_native(False)
    other = SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setattr(fp8_emulation_moe, "current_platform", other)
    found = oracle.select_fp8_moe_backend(moe_config(), *SCHEMES["block"])
    assert found == (oracle.Fp8MoeBackend.NONE, None)


def test_warns_once():
    vllm.logger._print_warning_once.cache_clear()
    handler = BufferingHandler(capacity=10)
    fp8_emulation_moe.logger.addHandler(handler)
    try:
        make_kernel(Experts.random())
        make_kernel(Experts.random(CHANNEL))
    finally:
        fp8_emulation_moe.logger.removeHandler(handler)
    assert [r.levelname for r in handler.buffer] == ["WARNING"]
    assert "FP8 emulation" in handler.buffer[0].getMessage()
