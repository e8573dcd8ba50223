# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The scan of scales, in Triton's interpreter on a CPU and for real on a GPU."""

import math
from itertools import product

import pytest
import torch

from vllm.model_executor.layers.fused_moe import scale_scan
from vllm.model_executor.layers.fused_moe.scale_scan import ScaleFaults, scan_scales

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.forked] if DEVICE == "cuda" else []

E8M0 = torch.float8_e8m0fnu
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
EXPONENTS = (E8M0, torch.uint8, torch.int32)
BAD = {"nan": math.nan, "infinite": math.inf, "negative": -1.5, "zero": 0.0}
CHUNK = scale_scan._CHUNK
# More than the programs of one tensor read at once.
LONG = CHUNK * scale_scan._MAX_PROGRAMS_PER_TENSOR + 1


def exponents(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return codes.to(torch.uint8).view(dtype)


def expected(name: str, scale: torch.Tensor) -> ScaleFaults | None:
    """What a scan must find in a scale, by another road: float64 and no bits."""
    if scale.dtype in EXPONENTS:
        codes = scale.cpu().contiguous().view(torch.uint8)
        values = torch.ldexp(torch.ones(()).double(), codes.double() - 127)
        values[codes == 255] = math.nan
    else:
        values = scale.cpu().double()
    nan, infinite, zero = values.isnan(), values.isinf(), values == 0
    negative = (values < 0) & ~infinite
    serious = nan | infinite | negative
    bad = serious if serious.any() else zero
    if not bad.any():
        return None
    index = tuple(bad.nonzero()[0].tolist())
    kinds = dict(nan=nan, infinite=infinite, negative=negative, zero=zero)
    counts = {kind: int(found.sum()) for kind, found in kinds.items()}
    return ScaleFaults(name, **counts, index=index, value=values[index].item())


def assert_found(scales: dict[str, torch.Tensor]) -> None:
    found = scan_scales({name: scale.to(DEVICE) for name, scale in scales.items()})
    wanted = filter(None, (expected(name, scale) for name, scale in scales.items()))
    assert list(map(repr, found)) == list(map(repr, wanted))  # NaN is not equal to NaN


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_pattern(dtype):
    patterns = torch.arange(2**16).to(torch.uint16).view(dtype)
    assert_found({"all": patterns, "backwards": patterns.flip(0)})
    assert_found({str(i): patterns[i : i + 1] for i in range(0, 2**16, 509)})


@pytest.mark.parametrize("dtype", EXPONENTS, ids=str)
def test_every_exponent(dtype):
    codes = torch.arange(256)
    assert_found({"all": exponents(codes, dtype)})
    assert_found({"valid": exponents(codes[:-4], dtype)})
    (found,) = scan_scales({"all": exponents(codes, dtype).to(DEVICE)})
    assert (found.nan, found.index) == (1, (255,))


@pytest.mark.parametrize(
    "bits",
    [0x00000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF]  # denormal, normal, largest
    + [0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x80000000]
    + [0x80000001, 0xFF7FFFFF, 0xFF800000, 0xFF800001, 0xFFFFFFFF, 0x00000000],
    ids=hex,
)
def test_edges_of_float32(bits):
    scale = torch.ones(7)
    scale.view(torch.int32)[3] = bits - ((bits >> 31) << 32)
    assert_found({"edge": scale})
    assert bool(scan_scales({"edge": scale.to(DEVICE)})) != (0 < bits < 0x7F800000)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", BAD)
def test_one_bad_scale_anywhere(dtype, kind):
    size = 2 * CHUNK + 5
    places = [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, size - 1]
    scales = {str(place): torch.ones(size, dtype=dtype) for place in places}
    for place, scale in zip(places, scales.values()):
        scale[place] = BAD[kind]
    found = scan_scales({name: scale.to(DEVICE) for name, scale in scales.items()})
    assert [faults.index for faults in found] == [(place,) for place in places]
    assert all(getattr(faults, kind) == 1 for faults in found)


def test_random_tensors():
    """Ragged tensors of all types, each value bad with a chance of 0, 1 % or 100 %."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(), (1,), (3, 4), (0, 5), (2, 3, 8), (CHUNK,), (5, CHUNK // 2 + 4)]
    for chance in (0, 0.01, 1):
        scales = {}
        for dtype, size in product((*FLOATS, *EXPONENTS), sizes):
            bad = torch.rand(size, generator=generator) < chance
            if dtype in FLOATS:
                scale = torch.rand(size, generator=generator) + 1e-3
                kinds = torch.tensor(list(BAD.values()))
                which = torch.randint(4, size, generator=generator)
                scale = torch.where(bad, kinds[which], scale).to(dtype)
            elif dtype == torch.int32 and (not size or size[-1] % 4):
                continue
            else:
                codes = torch.randint(255, size, generator=generator)
                scale = exponents(torch.where(bad, 255, codes), dtype)
            scales[f"{dtype}{list(size)}"] = scale
        assert_found(scales)


def test_first_of_many_is_the_same_in_every_run():
    scale = torch.full((LONG,), math.nan)
    scale[:77] = 1
    scale[3] = 0
    scales = {"scale": scale.to(DEVICE)}
    for _ in range(3 if DEVICE == "cpu" else 100):
        (found,) = scan_scales(scales)
        assert (found.index, found.nan, found.zero) == ((77,), LONG - 77, 1)


def test_last_of_a_long_tensor():
    scale = torch.ones(LONG)
    scale[-1] = math.inf
    assert_found({"long": scale, "short": torch.ones(3)})


@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8], ids=str)
def test_tensors_at_any_address(dtype):
    scale = torch.ones(64, dtype=dtype)
    scale[0] = scale[33] = 255 if dtype == torch.uint8 else math.nan
    on_device = scale.to(DEVICE)
    found = scan_scales({str(i): on_device[i : i + 9] for i in range(1, 40)})
    assert [int(f.name) + f.index[0] for f in found] == [33] * 9


def test_index_of_a_view_is_the_view_s():
    scale = torch.ones(4, 6, 5)
    scale[3, 2, 1] = -1
    (found,) = scan_scales({"view": scale.to(DEVICE).permute(2, 0, 1)[:, 1:]})
    assert (found.index, found.value) == ((1, 2, 2), -1)


def test_packed_columns():
    """Four columns to an int32 that lies along the rows, as kernels want it."""
    codes = torch.full((3, 5, 8), 127)
    codes[2, 4, 6] = 255
    packed = exponents(codes, torch.int32).mT.contiguous().mT
    assert_found({"packed": packed})
    (found,) = scan_scales({"packed": packed.to(DEVICE)})
    assert found.index == (2, 4, 6)


def test_packed_scalar():
    (found,) = scan_scales({"one": torch.tensor(0x7FFF7F7F).int().to(DEVICE)})
    assert found.index == (2,)


def test_nothing_to_scan():
    assert scan_scales({}) == []
    assert scan_scales({"empty": torch.empty(3, 0, device=DEVICE)}) == []


def test_no_type_of_scale():
    scales = {"good": torch.ones(1), "odd": torch.ones(1, dtype=torch.int64)}
    with pytest.raises(TypeError, match="scale odd: expected .*float32.*, got .*int64"):
        scan_scales({name: scale.to(DEVICE) for name, scale in scales.items()})


def test_on_two_devices():
    scales = {"here": torch.ones(1, device=DEVICE), "there": torch.ones(1).to("meta")}
    with pytest.raises(ValueError, match=f"scale there: .*{DEVICE}.*, got meta"):
        scan_scales(scales)


def test_on_no_device():
    with pytest.raises(ValueError, match="scale it: .*accelerator, got meta"):
        scan_scales({"it": torch.ones(1, device="meta")})


def test_too_many_values():
    many = torch.ones(1, device=DEVICE).expand(2**31)  # takes the memory of one
    with pytest.raises(ValueError, match=r"scale many: .*2\*\*31 values"):
        scan_scales({"many": many})
