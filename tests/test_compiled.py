"""Reading by compiled C: what attention gives, when it is used, and that nothing is lost where it cannot be had."""

import threading

import pytest
import torch
from caches import NAMES, decodes_as_itself, text, through
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from headwise import compiled, pieces
from headwise.attach import caching
from headwise.cache import Duo
from headwise.kv_cache import kv_units

here = pytest.mark.skipif(not compiled.available(), reason="no C compiler on this machine")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    return scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale).float()


@here
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, compiled.ROWS),
    st.integers(1, 400),
    st.sampled_from([(64, 64), (128, 128), (16, 16), (80, 80), (100, 36), (256, 256), (1, 3)]),
    st.integers(1, 7),
    st.sampled_from([None, 0.3]),
    st.sampled_from([1.0, 30.0]),
)
def test_it_is_attention(batch, heads, rows, keys, sizes, threads, scale, sharp):
    """Queries as a model lays them out, keys in a buffer with room, values that lie as queries do."""
    size, size_v = sizes
    q = sharp * drawn(batch, rows, heads, size).transpose(1, 2)
    k = drawn(batch, heads, keys + 9, size, seed=1)[:, :, :keys]
    v = drawn(batch, keys, heads, size_v, seed=2).transpose(1, 2)
    own, torch.get_num_threads = torch.get_num_threads, lambda: threads
    try:
        assert compiled.serves(q, k, v)
        z = compiled.read(q, k, v, scale)
    finally:
        torch.get_num_threads = own
    # Sharp scores are large, and what rounds them rounds PyTorch's as much.
    torch.testing.assert_close(z, exact(q, k, v, scale), atol=2e-6 * sharp**2, rtol=1e-5)


@here
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("keys", [1, 63, 64, 65, 127, 128, 129, 256, 257, 1000])
def test_pieces_and_blocks_lose_no_key(keys, threads, monkeypatch):
    """With equal scores the result is the mean of all values, each counted once."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    values = torch.arange(1.0, keys + 1).view(1, 1, keys, 1).expand(1, 3, keys, 16).contiguous()
    z = compiled.read(torch.zeros(1, 3, 2, 16), drawn(1, 3, keys, 16), values)
    torch.testing.assert_close(z, torch.full_like(z, (keys + 1) / 2))


@here
def test_scores_that_no_exponential_can_hold():
    k, v = drawn(1, 1, 300, 64), drawn(1, 1, 300, 64, seed=1)
    best = int((k @ k[0, 0, 7])[0, 0].argmax())
    z = compiled.read(1e4 * k[:, :, 7:8], k, v)
    torch.testing.assert_close(z[0, 0, 0], v[0, 0, best])
    k[0, 0, 5] = torch.nan
    assert compiled.read(k[:, :, 7:8], k, v).isnan().all()


def test_in_how_many_pieces():
    assert [compiled.pieces(heads, 8192, 2) for heads in (1, 2, 3, 4, 8)] == [2, 1, 2, 1, 1]
    assert [compiled.pieces(3, keys, 8) for keys in (100, 255, 256, 512, 8192)] == [1, 1, 2, 4, 8]
    assert compiled.pieces(32, 8192, 8) == 1 and compiled.pieces(12, 8192, 8) == 2


@here
def test_what_is_left_to_pytorch(monkeypatch):
    q, k = drawn(1, 2, 3, 8), drawn(1, 2, 30, 8)
    assert compiled.serves(q, k, k)
    assert not compiled.serves(q.bfloat16(), k.bfloat16(), k.bfloat16())
    assert not compiled.serves(q.to("meta"), k.to("meta"), k.to("meta"))
    assert not compiled.serves(q, k, k.transpose(2, 3).contiguous().transpose(2, 3))
    assert not compiled.serves(q, k, nn.Parameter(k))
    assert not compiled.serves(drawn(1, 2, compiled.ROWS + 1, 8), k, k)
    with pytest.raises(RuntimeError, match="9 queries of 8 channels"):
        compiled.read(drawn(1, 2, compiled.ROWS + 1, 8), k, k)
    assert not compiled.serves(drawn(1, 1, 1, 257), drawn(1, 1, 5, 257), drawn(1, 1, 5, 257))
    sloped = k.clone().requires_grad_()
    assert not compiled.serves(q, sloped, k)
    pieces.read(q, sloped, k).sum().backward()
    assert sloped.grad is not None
    with torch.no_grad():
        assert compiled.serves(q, sloped, k)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not compiled.serves(q, k, k)


@here
def test_small_numbers_stay_what_they_are():
    """A library linked with -ffast-math would set whole threads to flush them to zero."""
    found = [float(torch.tensor(1e-40) * 1)]
    other = threading.Thread(target=lambda: found.append(float(torch.tensor(1e-40) * 1)))
    other.start()
    other.join()
    assert all(9e-41 < one < 1.1e-40 for one in found)


@here
@pytest.mark.parametrize("name", [*NAMES, "qwen3"])
def test_decoding_is_the_models_own(models, name, monkeypatch):
    """One token after the other, all heads full, with rows of one length and of different lengths."""
    model, turns, read, asked = models(name), [20, 5, *[1] * 15], [], compiled.serves
    monkeypatch.setattr(compiled, "serves", lambda *given: asked(*given) and not read.append(given))
    for pads in ((0, 0), (0, 5)):
        decodes_as_itself(model, text(length=40, pads=pads), turns)
    assert read or name == "gemma2"


@here
def test_streaming_heads_are_read_alike(models, monkeypatch):
    model, turns, inputs = models("llama"), [20, *[1] * 20], text(length=40)
    half = kv_units(model)[::2]
    with caching(model):
        mine = through(model, inputs, Duo(2, 6).build(model, half), turns)
        monkeypatch.setattr(compiled, "serves", lambda *_: False)
        theirs = through(model, inputs, Duo(2, 6).build(model, half), turns)
    torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-4)


@pytest.fixture
def found_by(tmp_path, monkeypatch):
    """Whether there is a library when this script is the compiler; None is a compiler that is not there."""

    def found(script: str | None, home: str = "home") -> bool:
        compiler = tmp_path / "compiler"
        if script is not None:
            compiler.write_text(f"#!/bin/sh\n{script}\n")
            compiler.chmod(0o755)
        monkeypatch.setenv("HEADWISE_CC", str(compiler))
        monkeypatch.setenv("HEADWISE_HOME", str(tmp_path / home))
        return compiled._library.__wrapped__() is not None

    return found


@here
def test_compilers_that_fail_or_lie_are_not_used(tmp_path, found_by):
    version = 'if [ "$1" = --version ]; then exit 0; fi; '
    assert not found_by(None)
    assert not found_by("exit 1")
    assert not found_by(version + "exit 1")
    assert not found_by(version + 'while [ "$1" != -o ]; do shift; done; echo > "$2"')
    assert not found_by('exec cc -Dexpf=expm1f "$@"')
    (tmp_path / "file").write_text("")
    assert not found_by('exec cc "$@"', home="file")


@here
def test_it_is_compiled_once(tmp_path, found_by):
    script = f'echo . >> {tmp_path}/runs; exec cc "$@"'
    assert found_by(script) and found_by(script)
    # Each asks for the version, to know what it is looking for; the first one compiles.
    assert len((tmp_path / "runs").read_text().split()) == 3
    assert [one.suffix for one in (tmp_path / "home" / "compiled").iterdir()] == [".so"]


def test_an_empty_name_turns_it_off(monkeypatch):
    monkeypatch.setenv("HEADWISE_CC", "")
    assert compiled._library.__wrapped__() is None
