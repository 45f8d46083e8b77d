"""How caches read: keys in pieces for all threads, masks in portions, heads as slices; always what one pass gives."""

from types import SimpleNamespace

import kv_twins
import pytest
import torch
from caches import NAMES, build, built_once, decodes_as_itself, text, through
from families import FAMILIES
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from headwise import compiled, pieces, store
from headwise.attach import caching
from headwise.cache import Duo, Preallocated, Razor, SnapKV
from headwise.kv_cache import _evenly, kv_units
from headwise.recall import bytes_of
from headwise.store import Full, Turn


@pytest.fixture(scope="module")
def models():
    return built_once()


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("scale", [None, 0.3], ids=str)
@pytest.mark.parametrize(("keys", "count"), [(40, 2), (41, 2), (41, 3), (47, 4), (5, 4)], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_keys_in_pieces_are_read_as_in_one(rows, keys, count, scale):
    room = drawn(2, rows, 3, 60, 8)
    k, v = room[0, :, :, :keys], room[1, :, :, :keys]
    for queries in (1, 3):
        q = drawn(rows, 3, queries, 8, seed=1)
        whole = scaled_dot_product_attention(q, k, v, scale=scale)
        torch.testing.assert_close(pieces.read_in(count, q, k, v, scale), whole, atol=1e-6, rtol=1e-5)
        half = pieces.read_in(count, q.bfloat16(), k.bfloat16(), v.bfloat16(), scale)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), whole, atol=0.05, rtol=0.05)


def test_pieces_of_a_buffer_copy_nothing():
    room = drawn(2, 3, 60, 8)
    cut = pieces._cut(room[:, :, :50], 0, 2, 25)
    assert cut.data_ptr() == room.data_ptr() and cut.shape == (6, 2, 25, 8)


def test_in_how_many_pieces(monkeypatch):
    def count(rows: int, heads: int, keys: int, threads: int, **how) -> int:
        q, k = torch.zeros(rows, heads, 1, 8, **how), torch.zeros(1).expand(rows, heads, keys, 8)
        return pieces.pieces(q, k, k, threads)

    monkeypatch.setattr(pieces, "LEAST", 512)
    assert [count(1, heads, 8192, 2) for heads in (1, 2, 3, 4, 8)] == [2, 1, 2, 1, 1]
    assert [count(1, 3, keys, 8) for keys in (100, 1023, 1024, 2048, 8192)] == [1, 1, 2, 4, 8]
    assert count(4, 3, 8192, 8) == 2 and count(1, 3, 8192, 1) == 1
    assert count(1, 3, 8192, 2, requires_grad=True) == 1
    with torch.no_grad():
        assert count(1, 3, 8192, 2, requires_grad=True) == 2
    narrow, wide = torch.zeros(1, 3, 4096, 4), torch.zeros(1, 3, 4096, 8)
    assert pieces.pieces(wide[:, :, :1], wide, narrow, 2) == 1


@pytest.mark.parametrize("lags", [True, False], ids=["blas lags", "blas keeps up"])
@pytest.mark.parametrize("name", [*NAMES, "qwen3"])
def test_decoding_in_pieces_is_decoding(models, name, lags, monkeypatch):
    """All heads full, one half full, and rows of different lengths; as PyTorch reads them."""
    monkeypatch.setattr(compiled, "serves", lambda *_: False)
    monkeypatch.setattr(pieces, "FOURTH", lags)
    model, turns = models(name), [20, 5, *[1] * 15]
    monkeypatch.setattr(pieces, "LEAST", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    cut = []
    whole = pieces.read_in
    monkeypatch.setattr(pieces, "read_in", lambda count, *given: cut.append(count) or whole(count, *given))
    for pads in ((0, 0), (0, 5)):
        decodes_as_itself(model, text(length=40, pads=pads), turns)
    assert set(cut) <= {3} and (cut or name == "gemma2")


@pytest.mark.parametrize("pads", [(0, 0), (0, 7)], ids=str)
@pytest.mark.parametrize("turns", [[20, 17, 3], [40], [20, 8, *[1] * 12]], ids=len)
def test_masks_in_portions_say_the_same(models, turns, pads, monkeypatch):
    inputs = text(length=40, pads=pads)
    real = inputs["attention_mask"].bool()
    for name in ("llama", "gpt2", "gemma2", "gemma3"):
        model = models(name)
        own = DynamicCache(config=model.config)
        want = kv_twins.cached_logits(model, inputs["input_ids"], inputs["attention_mask"], own, turns)
        for method in (Preallocated(), Razor(2, 6), SnapKV(4, 10, kernel=3)):
            with caching(model):
                monkeypatch.setattr(store, "PORTION", 256)
                whole = through(model, inputs, method.build(model), turns)
                monkeypatch.setattr(store, "PORTION", 6)
                parts = through(model, inputs, method.build(model), turns)
            torch.testing.assert_close(parts[real], whole[real], atol=2e-4, rtol=1e-4)
            if method == Preallocated():
                torch.testing.assert_close(parts[real], want[real], atol=2e-4, rtol=1e-4)


class Largest(TorchDispatchMode):
    """The most elements that any tensor had that was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, _, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor):
                self.most = max(self.most, one.numel())
        return out


def test_no_mask_of_a_whole_chunk_is_made():
    """A chunk of 1024 tokens over 3072 earlier ones, three query heads to a KV head."""
    q, k, v = drawn(1, 3, 1024, 16), drawn(1, 1, 1024, 16), drawn(1, 1, 1024, 16)
    kept = Full(4096)
    with torch.no_grad():
        for past in (0, 1024, 2048):
            kept.read(q, k, v, Turn(past))
        with Largest() as made:
            kept.read(q, k, v, Turn(3072))
    assert made.most <= store.PORTION * 4096 < 1024 * 4096


@pytest.mark.parametrize("full", ["01", "12", "02", "0", "1", "013", "0134"], ids=str)
def test_any_heads_of_a_layer_may_be_full(full):
    """Heads that are evenly spaced are taken as slices, others by number: in both ways each reads its own."""
    family = FAMILIES["llama"]
    fields = {**family.fields, "num_attention_heads": 10, "num_key_value_heads": 5, "hidden_size": 40, "head_dim": 8}
    model = type(family)(family.model, family.config, fields).build()
    streams = [unit for unit in kv_units(model) if unit[-1] not in full]
    method, inputs = Duo(2, 5), text(length=40, pads=(0, 6))
    with caching(model):
        got = through(model, inputs, method.build(model, streams), [20, 8, *[1] * 12])
    seen = kv_twins.streaming(2, 5, torch.tensor((0, 6)))

    def visible(unit, query, key):
        first = torch.tensor((0, 6))[:, None, None]
        return seen(unit, query, key) if unit in streams else key >= first

    want = kv_twins.masked_logits(model, inputs["input_ids"], inputs["attention_mask"], visible)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], atol=2e-4, rtol=1e-4)


def test_heads_evenly_spaced_are_a_slice():
    for numbers in ([3], [0, 1], [0, 2], [1, 4, 7], [2, 3, 4]):
        assert list(range(8)[_evenly(numbers)]) == numbers
    assert _evenly([0, 1, 3]) is None and _evenly([0, 2, 3]) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", [*NAMES, "qwen3"])
def test_with_everything_kept_half_precision_is_near_its_own(name, dtype):
    model, turns = build(name, dtype), [20, 8, *[1] * 12]
    inputs = text(length=40, pads=(0, 5))
    real = inputs["attention_mask"].bool()
    own = DynamicCache(config=model.config)
    want = kv_twins.cached_logits(model, inputs["input_ids"], inputs["attention_mask"], own, turns)[real].float()
    with caching(model):
        got = through(model, inputs, Preallocated().build(model), turns)[real].float()
    assert (got - want).norm() / want.norm() < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_bytes_in_tuples_are_counted():
    """As transformers' caches of few bits hold them: codes beside their scale."""
    layer = SimpleNamespace(keys=torch.zeros(4), coded=(torch.zeros(3, dtype=torch.int8), torch.zeros(1)), length=3)
    assert bytes_of(SimpleNamespace(layers=[layer])) == 16 + 3 + 4
