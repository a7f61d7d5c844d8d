"""attention.c against torch's own attention: each of its forms, compiled here for a processor that has no more."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autoembed.encoding.packed import kernels, network
from autoembed.encoding.packed.network import Attention, Packed, Shape, Workspace
from autoembed.process.cpu import flags as cpu_flags

SOURCE = Path(network.__file__).with_name("attention.c")
# What the compiled code is told of the processor: its flags are compared by a letter that only avx512f has there.
PROCESSORS = {"avx512": None, "avx2": "(name[3] != '5')", "any": "0"}
FLAGS = {"avx512": {"avx512f"}, "avx2": {"avx2", "fma"}, "any": set()}
LENGTHS = [1, 2, 5, 6, 7, 15, 16, 17, 31, 64, 65, 145, 300]

Make = Callable[..., Attention]


@pytest.fixture(scope="module", params=PROCESSORS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    told = PROCESSORS[request.param]
    if not FLAGS[request.param] <= cpu_flags():
        pytest.skip(f"this processor has no {request.param}")
    if told is None:
        whole = kernels.library()
        assert whole is not None
        return whole
    built = tmp_path_factory.mktemp("kernels") / "attention.so"
    flags = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", f"-D__builtin_cpu_supports(name)={told}"]
    subprocess.run(["gcc", *flags, "-shared", "-fPIC", str(SOURCE), "-o", str(built), "-lm"], check=True)
    return ctypes.CDLL(str(built))


@pytest.fixture
def default_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(kernels, "library", lambda: library)

    def attention(
        heads: int = 3, size: int = 32, *, biased: bool = True, dtype: torch.dtype = torch.float32
    ) -> Attention:
        config = {"model_type": "mpnet", "hidden_size": heads * size, "num_attention_heads": heads}
        torch.manual_seed(7)
        weights = {"encoder.relative_attention_bias.weight": torch.randn(32, heads) * 2} if biased else {}
        return Attention(Shape.of(config), weights, Workspace(dtype))

    return attention


def packed(lengths: list[int]) -> Packed:
    return Packed.of([[5] * length for length in lengths])


def random(attention: Attention, lengths: list[int], scale: float = 1.0) -> Tensor:
    torch.manual_seed(8)
    return torch.randn(sum(lengths), 3 * attention.shape.width) * scale


def seen(attention: Attention, lengths: list[int], joined: Tensor) -> Tensor:
    return attention.of(packed(lengths))(joined, joined.new_empty(len(joined), attention.shape.width))


def exact(attention: Attention, lengths: list[int], joined: Tensor) -> Tensor:
    """By torch in float64: two roundings of float32 differ from each other by more than each from what is right."""
    doubled = joined.double()
    out = doubled.new_empty(len(joined), attention.shape.width)
    return attention.by_torch(packed(lengths), attention.biases(max(lengths)), doubled, out).float()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("size", [16, 32, 48, 64, 80, 128])
def test_the_same_as_torch(make: Make, size: int, biased: bool) -> None:
    attention = make(size=size, biased=biased)
    joined = random(attention, LENGTHS)
    expected = exact(attention, LENGTHS, joined)
    torch.testing.assert_close(seen(attention, LENGTHS, joined), expected, atol=6e-6, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 5.0])
def test_scores_that_are_all_alike_and_scores_far_apart(make: Make, scale: float) -> None:
    attention = make()
    joined = random(attention, LENGTHS, scale)
    expected = exact(attention, LENGTHS, joined)
    torch.testing.assert_close(seen(attention, LENGTHS, joined), expected, atol=2e-5 * scale, rtol=1e-5)


def test_scores_far_below_zero_do_not_vanish_beside_the_padding(make: Make) -> None:
    """A score is the sum of 32 products, and each sum on the way may be off by half a unit in its last place. What two
    scores are off, their weights' ratio is off as well, and so is what is seen."""
    attention = make(biased=False)
    joined = random(attention, [5])
    query, key, value = joined.view(5, 3, -1).unbind(1)
    query[:], key[:] = 40.0, -40.0 + 0.01 * torch.randn(5, 96)
    score = 32 * 40 * float(key.abs().max()) * attention.scale
    bound = 2 * 32 * torch.finfo(torch.float32).eps / 2 * score * float(value.abs().max())
    assert bound < 0.2
    torch.testing.assert_close(seen(attention, [5], joined), exact(attention, [5], joined), atol=bound, rtol=0)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_text_sees_itself_alone_bit_for_bit(make: Make, threads: int, default_threads: None) -> None:
    attention = make()
    joined = random(attention, LENGTHS)
    torch.set_num_threads(threads)
    together = packed(LENGTHS).split(seen(attention, LENGTHS, joined))
    for length, own, expected in zip(LENGTHS, packed(LENGTHS).split(joined), together, strict=True):
        assert torch.equal(seen(attention, [length], own.clone()), expected)


def test_what_is_not_a_number_stays_with_its_text(make: Make) -> None:
    attention = make()
    joined = random(attention, [7, 7])
    clean = seen(attention, [7, 7], joined)
    joined[3, 100] = float("nan")
    found = seen(attention, [7, 7], joined)
    assert found[:7].isnan().any()
    assert torch.equal(found[7:], clean[7:])


def test_bfloat16_is_computed_in_float32(make: Make) -> None:
    attention = make(dtype=torch.bfloat16)
    joined = random(attention, LENGTHS).bfloat16()
    found = seen(attention, LENGTHS, joined)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, seen(attention, LENGTHS, joined.float()).bfloat16())


def test_heads_of_other_sizes_are_left_to_torch(make: Make) -> None:
    assert make(size=24).library is None
