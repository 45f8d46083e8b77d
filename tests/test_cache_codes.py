"""Keys and values in few bits: how many bytes, how near, alone and inside other methods."""

import sys

import naive_codes
import pytest
import torch
from caches import text, through

from headwise.attach import caching
from headwise.cache import AdaKV, Preallocated, Quantised, Razor, SnapKV, Streaming
from headwise.codes import Codes, primitives

PRIMITIVES = primitives
pytestmark = pytest.mark.usefixtures("codes")


def test_few_bits_are_few_bytes_and_near():
    x = torch.randn(2, 3, 50, 64, generator=torch.Generator().manual_seed(0))
    x[..., 7] *= 10
    for bits, most, off in ((8, 0.27, 0.02), (4, 0.165, 0.2)):
        codec = Codes(bits)
        parts = codec.encode(x)
        again = codec.decode(parts)
        assert sum(one.numel() * one.itemsize for one in parts) <= most * x.numel() * 4
        assert (again - x).norm() / x.norm() < off
        for one, other in zip(codec.encode(again), parts, strict=True):
            assert (one.float() - other.float()).abs().mean() < 1e-3
        half = codec.decode(codec.encode(x.bfloat16()))
        assert half.dtype == torch.bfloat16 and (half.float() - x).norm() / x.norm() < off + 0.01


@pytest.mark.parametrize("inner", [None, Streaming(2, 12), Razor(2, 12), SnapKV(4, 16), AdaKV(4, 16)], ids=str)
def test_few_bits_change_little(models, inner):
    model, inputs = models("llama"), text(length=60, pads=(0, 5))
    real, turns = inputs["attention_mask"].bool(), [30, *[1] * 30]
    with caching(model):
        want = through(model, inputs, (inner or Preallocated()).build(model), turns)[real]
        for bits, most in ((8, 0.01), (4, 0.1)):
            got = through(model, inputs, Quantised(bits, of=inner).build(model), turns)[real]
            assert 0 < (got - want).norm() / want.norm() < most


@pytest.mark.parametrize("inner", [None, Streaming(2, 12), Razor(2, 12), SnapKV(4, 16), AdaKV(4, 16)], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_draft_reads_what_single_tokens_read(models, bits, inner):
    model, inputs = models("llama"), text(length=60, pads=(0, 5))
    # Four tokens would be a prompt to those whose window is four.
    one_by_one, drafted = [30, *[1] * 30], [30, 3, 3, 3, 1, 2, *[3] * 6]
    with caching(model):
        alone, together = (
            through(model, inputs, Quantised(bits, of=inner).build(model), turns)[:, 30:]
            for turns in (one_by_one, drafted)
        )
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)


def test_the_naive_codes_are_those_of_torchao():
    real = pytest.importorskip("torchao.quantization.quant_primitives")
    x = torch.randn(2, 3, 50, 64, generator=torch.Generator().manual_seed(0))
    for bits in (8, 4):
        ours, theirs = Codes(bits), Codes(bits)
        ours.tools, theirs.tools = naive_codes, real
        for one, other in zip(ours.encode(x), theirs.encode(x), strict=True):
            torch.testing.assert_close(one, other, atol=1, rtol=1e-5)
        parts = theirs.encode(x)
        torch.testing.assert_close(ours.decode(parts), theirs.decode(parts), atol=1e-5, rtol=1e-5)


def test_without_torchao_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"pip install headwise\[quantised\]"):
        PRIMITIVES()


def test_a_method_inside_another_has_a_name():
    method = Quantised(4, of=Streaming(2, 6))
    inner = {"name": "cache.streaming", "fields": {"sink": 2, "recent": 6}}
    assert method.identity() == {"name": "cache.quantised", "fields": {"bits": 4, "of": inner}}
    assert Quantised().identity()["fields"] == {"bits": 8, "of": None}
