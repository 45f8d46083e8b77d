"""Packed weights: the same products, the model as it was afterwards, and no weight that has gone stale."""

import re

import pytest
import torch
from families import FAMILIES

from headwise import packing
from headwise.decode import CopySpec
from headwise.matmul import offered
from headwise.packing import Packed

here = pytest.mark.skipif(not offered(torch.ones(1, 1)), reason="packs on a CPU with AVX-512")


@pytest.fixture(autouse=True, params=[True, False], ids=["blas lags", "blas keeps up"])
def maker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors of either kind, whatever this one is."""
    monkeypatch.setattr(packing, "blas_lags", lambda: request.param)


@here
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2"])
@pytest.mark.parametrize("tokens", [1, 2, 11, 40])
def test_products_are_the_models_own_within_rounding(family: str, tokens: int) -> None:
    model = FAMILIES[family].build()
    ids = torch.randint(3, 30, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    with torch.no_grad():
        plain = model(ids).logits
        with Packed(model) as packed:
            ours = model(ids).logits
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert packed.bytes == sum(4 * one.weight.numel() for one in model.modules() if type(one) is torch.nn.Linear)


@here
def test_layers_are_handed_back_and_a_block_may_stand_in_a_block() -> None:
    model = FAMILIES["llama"].build()
    packed, layer = Packed(model), model.model.layers[0].mlp.down_proj
    assert "forward" not in vars(layer)
    with packed, packed:
        assert "forward" in vars(layer)
    assert not any("forward" in vars(one) for one in model.modules())
    with pytest.raises(KeyError), packed:
        raise KeyError
    assert "forward" not in vars(layer)


@here
def test_a_layer_that_is_taken_is_left_alone() -> None:
    model = FAMILIES["llama"].build()
    packed = Packed(model)
    theirs = model.lm_head.forward = lambda x: x
    with packed:
        assert vars(model.lm_head)["forward"] is theirs
    assert vars(model.lm_head)["forward"] is theirs


@here
def test_a_weight_that_was_changed_is_packed_again() -> None:
    model, ids = FAMILIES["llama"].build(), torch.tensor([[4, 5, 6]])
    packed = Packed(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        plain = model(ids).logits
        with packed:
            torch.testing.assert_close(model(ids).logits, plain, atol=1e-5, rtol=1e-5)
        model.lm_head.weight.data = model.lm_head.weight.data / 4
        with packed:
            torch.testing.assert_close(model(ids).logits, plain / 4, atol=1e-5, rtol=1e-5)


@here
def test_drafts_and_plain_generation_write_the_same_with_packed_weights() -> None:
    model = FAMILIES["llama"].build()
    ids = torch.tensor([[4, 5, 6, 7, 8, 4, 5, 6, 7]])
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    with Packed(model):
        plain = model.generate(ids, **how)
        assert torch.equal(CopySpec(gamma=2).generate(model, ids, **how).ids, plain)


def test_what_cannot_be_packed_is_said() -> None:
    model = FAMILIES["llama"].build().to(torch.bfloat16)
    with pytest.raises(ValueError, match=re.escape("on cpu in torch.bfloat16 has no products to pack")):
        Packed(model)
