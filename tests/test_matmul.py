"""Quick products: the layer's own within rounding, its own where it must be, and given back in whatever order."""

import copy
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from torch import nn

import headwise
from headwise import matmul
from headwise.cache.preallocated import Preallocated
from headwise.matmul import Quick, blas_lags, fast_matmul, offered, quick, stand_in
from headwise.packing import Packed

here = pytest.mark.skipif(not offered(torch.ones(1, 1)), reason="quick on a CPU with AVX-512")


@pytest.fixture(autouse=True)
def lagging(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that BLAS falls behind, whatever this one is."""
    monkeypatch.setattr(matmul, "blas_lags", lambda: True)


@here
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out", [6, 35])
@pytest.mark.parametrize("shape", [(5,), (1, 1), (2, 1), (1, 3), (2, 2), (1, 5), (3, 4), (0, 3)])
def test_a_product_is_the_layers_own(shape: tuple[int, ...], out: int, bias: bool) -> None:
    torch.manual_seed(sum(shape))
    layer, x = nn.Linear(24, out, bias=bias), torch.randn(*shape, 24)
    with torch.no_grad():
        found, wanted = Quick(layer)(x), layer(x)
        turned = Quick(layer)(torch.randn(24, *shape).movedim(0, -1).copy_(x))
    assert found.shape == wanted.shape and found.is_contiguous()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned, wanted, atol=1e-5, rtol=1e-5)


@here
def test_slopes_are_the_layers_own() -> None:
    layer, x = nn.Linear(8, 6), torch.randn(1, 8, requires_grad=True)
    own = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
    ours = torch.autograd.grad(Quick(layer)(x).square().sum(), [x, layer.weight])
    assert all(torch.equal(one, other) for one, other in zip(own, ours, strict=True))


@here
def test_a_layer_that_is_converted_or_changed_meanwhile_is_its_own() -> None:
    layer, x = nn.Linear(8, 6), torch.randn(2, 8)
    ours = Quick(layer)
    with torch.no_grad():
        layer.weight.mul_(2)
        torch.testing.assert_close(ours(x), layer(x))
        assert torch.equal(ours(x.bfloat16().float()[:0]), layer(x[:0]))
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(x).dtype == torch.bfloat16 and torch.equal(ours(x), layer(x))
        layer.bfloat16()
        assert torch.equal(ours(x.bfloat16()), layer(x.bfloat16()))


@here
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gpt_neox"])
def test_an_attached_model_multiplies_quickly_and_is_given_back(family: str) -> None:
    model = FAMILIES[family].build()
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    with torch.no_grad():
        own = model(ids[:, :1]).logits
        headwise.attach(model, Preallocated())
        assert any(isinstance(vars(one).get("forward"), Quick) for one in model.modules())
        torch.testing.assert_close(model(ids[:, :1]).logits, own, atol=1e-5, rtol=1e-5)
        # A copy multiplies by its own weights.
        other = copy.deepcopy(model)
        other.get_output_embeddings().weight.zero_()
        assert not other(ids).logits.any()
    headwise.detach(model)
    assert not any("forward" in vars(one) for one in model.modules())


@here
def test_blocks_may_end_in_any_order() -> None:
    model = FAMILIES["llama"].build()
    layer, packed = model.model.layers[0].mlp.up_proj, Packed(model)
    headwise.attach(model, Preallocated())
    mine = vars(layer)["forward"]
    with packed:
        assert vars(layer)["forward"] is not mine
    assert vars(layer)["forward"] is mine
    with packed:
        headwise.detach(model)
    assert "forward" not in vars(layer)
    first = stand_in({layer: lambda x: x})
    second = stand_in({layer: lambda x: 2 * x})
    first()
    assert layer(torch.ones(1)) == 2
    second()
    assert "forward" not in vars(layer)


@here
def test_a_layer_that_others_have_taken_is_left_to_them() -> None:
    model = FAMILIES["llama"].build()
    theirs = lambda x: x @ torch.ones(x.shape[-1], 3)  # noqa: E731
    model.lm_head.forward = theirs
    with fast_matmul(model):
        assert model.lm_head.forward is theirs
    leave = quick(model)
    assert model.lm_head.forward is theirs
    leave()
    assert vars(model.lm_head)["forward"] is theirs


@here
def test_an_attached_model_can_be_trained() -> None:
    model, ids = FAMILIES["llama"].build(), torch.tensor([[4, 5, 6, 7]])
    own = torch.autograd.grad(model(ids, labels=ids).loss, model.lm_head.weight)[0]
    headwise.attach(model, Preallocated())
    ours = torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, model.lm_head.weight)[0]
    headwise.detach(model)
    torch.testing.assert_close(ours, own)


def test_where_blas_keeps_up_the_model_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "blas_lags", lambda: False)
    model = FAMILIES["llama"].build()
    headwise.attach(model, Preallocated())
    assert not any("forward" in vars(one) for one in model.modules())
    headwise.detach(model)
    with fast_matmul(model, few=4):
        assert not any("forward" in vars(one) for one in model.modules())


@pytest.mark.parametrize(("maker", "lags"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_blas_lags_on_processors_that_are_not_intels(maker: str, lags: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: f"vendor_id\t: {maker}\n")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert blas_lags.__wrapped__() is lags
