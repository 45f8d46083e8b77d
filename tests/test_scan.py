"""Exact effects: the shared prefix against its naive twin, and a model that is left as it was."""

import pytest
import torch
from families import FAMILIES, SILENT, VOCAB
from torch import nn

from headwise.heads import Ablation
from headwise.matmul import fast_matmul, offered
from headwise.scan import HOWS, effects
from headwise.task import Batch, logprob

# One of each way in: grouped heads, experts, Conv1D, parallel blocks, MLA, a hybrid, encoders.
SHARED = ["llama", "gemma2", "mixtral", "gpt2", "gpt_neox", "opt", "deepseek_v3", "qwen3_next", "bert", "modernbert"]


def make(name: str = "llama", padded: bool = False, rows: int = 3) -> tuple:
    family = {**FAMILIES, **SILENT}[name]
    inputs = family.inputs(rows, padded=padded)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    ids = inputs["input_ids"]
    corrupt = dict(inputs)
    corrupt["input_ids"] = torch.where(inputs["attention_mask"] > 0, (ids * 7 + 1) % (VOCAB - 3) + 3, ids)
    width = inputs.get("decoder_input_ids", ids).shape[1]
    answer = torch.arange(2 * rows).view(rows, 2) % 50 + 5
    return family.build(), Batch(inputs, torch.tensor([[width - 3, width - 1]] * rows), answer, corrupt=corrupt)


def close(left, right, limit: float = 1e-5) -> None:
    assert list(left.changed) == list(right.changed)
    for unit in left.changed:
        torch.testing.assert_close(left.of(unit), right.of(unit), rtol=0, atol=limit, msg=lambda m, u=unit: f"{u}: {m}")


def marks(model: nn.Module) -> list:
    """What a scan could leave behind: hooks, replaced forwards, another attention."""
    own = [
        (n, "forward" in vars(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    ]
    return [*own, model.config._attn_implementation]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", SHARED)
def test_shared_prefix_equals_full_passes(name: str, how: str, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = make(name)
    shared = effects(model, batch, how=how)
    assert "scanning with full forward passes" not in caplog.text
    close(shared, effects(model, batch, how=how, share_prefix=False))
    assert max(float(shared.of(u).abs().max()) for u in shared.changed) > 1e-3


@pytest.mark.parametrize("how", ["zero", "restore"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_left_padding_and_rows_side_by_side(name: str, how: str) -> None:
    model, batch = make(name, padded=True)
    naive = effects(model, batch, how=how, share_prefix=False)
    close(effects(model, batch, how=how, variants=3), naive)
    close(effects(model, batch, how=how, variants=3, prompts=2), naive)


def test_zero_equals_a_hook_of_ones_own() -> None:
    model, batch = make()
    found = effects(model, batch, how="zero")
    with torch.no_grad():
        base = _by_hand(model, batch, None)
        for unit in ("L0.H0", "L0.H3", "L1.H2"):
            torch.testing.assert_close(found.of(unit), base - _by_hand(model, batch, unit), rtol=0, atol=1e-5)


def _by_hand(model: nn.Module, batch: Batch, unit: str | None) -> torch.Tensor:
    handles = []
    if unit is not None:
        layer, head = int(unit[1]), int(unit[4])

        def zero(_: nn.Module, args: tuple) -> tuple:
            z = args[0].clone()
            z[..., head * 8 : (head + 1) * 8] = 0
            return (z,)

        handles = [model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(zero)]
    logits = model(**batch.inputs).logits
    for handle in handles:
        handle.remove()
    return logprob(logits[torch.arange(len(batch))[:, None], batch.at], batch)


@pytest.mark.parametrize("how", ["zero", "mean", "resample", "restore"])
def test_sublayers(how: str) -> None:
    model, batch = make()
    units = ["L0.mlp", "L1.attn", "L1.mlp", "L1.H0", "L0.attn"]
    shared = effects(model, batch, units, how)
    assert list(shared.changed) == units
    close(shared, effects(model, batch, units, how, share_prefix=False))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_is_measured_with_full_passes_where_it_must(name: str) -> None:
    model, batch = make(name)
    units = ["L0.H1", "L1.H0", "enc.L1.H2", "cross.L0.H3"]
    mixed = effects(model, batch, units, "zero")
    close(mixed, effects(model, batch, units, "zero", share_prefix=False))
    main = effects(model, batch, units[:2], "zero")
    close(main, effects(model, batch, units[:2], "zero", share_prefix=False))
    assert all(float(mixed.of(u).abs().max()) > 1e-4 for u in units)


def test_a_block_that_does_not_pass_on_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = make()
    naive = effects(model, batch, how="zero", share_prefix=False)
    first = model.model.layers[0]
    # What the last layer says depends on more than the residual stream: the first layer's output, remembered aside.
    aside: list[torch.Tensor] = []
    keep = first.mlp.register_forward_hook(lambda _, args, out: aside.append(out))
    add = model.model.norm.register_forward_pre_hook(lambda _, args: (args[0] + aside.pop(),) if aside else None)
    with_memory = effects(model, batch, how="zero")
    assert "scanning with full forward passes" in caplog.text
    close(with_memory, effects(model, batch, how="zero", share_prefix=False))
    keep.remove()
    add.remove()
    close(effects(model, batch, how="zero"), naive)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_left_as_it_was(dtype: str) -> None:
    model, batch = make()
    before, state = marks(model), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        logits = model(**batch.inputs).logits
    effects(model, batch, how="mean", dtype=dtype)
    calls = []

    def metric(values: torch.Tensor, part: Batch) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return logprob(values, part)

    with pytest.raises(KeyboardInterrupt):
        effects(model, batch, how="zero", metric=metric, dtype=dtype)
    assert marks(model) == before
    with torch.no_grad():
        assert torch.equal(model(**batch.inputs).logits, logits)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_bfloat16_keeps_the_order_of_heads(name: str) -> None:
    model, batch = make(name, rows=8)
    exact, rounded = effects(model, batch, how="zero"), effects(model, batch, how="zero", dtype="bfloat16")
    both = torch.tensor([[float(e.of(u).mean()) for u in e.changed] for e in (exact, rounded)])
    assert float(torch.corrcoef(both.argsort().argsort().double())[0, 1]) > 0.97
    assert not torch.equal(both[0], both[1])
    torch.testing.assert_close(rounded.base, exact.base, rtol=0, atol=1e-5)
    close(effects(model, batch, how="zero", dtype="bfloat16", share_prefix=False), rounded, 5e-3)
    close(effects(model, batch, how="zero", dtype="bfloat16", variants=4, prompts=3), exact, 0.05)


def test_a_remembered_value_that_was_changed_in_place_is_not_used() -> None:
    model, batch = make()
    with torch.no_grad(), fast_matmul(model, "bfloat16") as products:
        with products.remember():
            exact = model(**batch.inputs).logits.clone()
        for x, out, *_ in list(products.runs.values()):
            x.add_(1)
            out.mul_(2)
        torch.testing.assert_close(model(**batch.inputs).logits, exact, rtol=0, atol=1e-5)
        products.forget()
        assert not products.runs
    with torch.inference_mode():
        effects(model, batch, ["L1.H0"], "zero", dtype="bfloat16")


def test_fast_products_are_the_model_s_own() -> None:
    for name in ("llama", "gpt2", "bert"):
        model, batch = make(name)
        with torch.no_grad():
            own = model(**batch.inputs).logits
            with fast_matmul(model):
                ours = model(**batch.inputs).logits
        torch.testing.assert_close(ours, own, rtol=0, atol=2e-5)


def test_wrapped_layers_and_other_dtypes_are_left_alone() -> None:
    model, _ = make()
    projection = model.model.layers[0].mlp.down_proj
    projection.forward = lambda x: nn.Linear.forward(projection, x)
    mine = projection.forward
    with fast_matmul(model), fast_matmul(model, "bfloat16"):
        assert projection.forward is mine
        assert ("forward" in vars(model.model.layers[1].mlp.down_proj)) or not offered(projection.weight)
    assert projection.forward is mine
    model = model.to(torch.bfloat16)
    with fast_matmul(model, "bfloat16"):
        assert "forward" not in vars(model.model.layers[1].mlp.down_proj)


def test_sentences() -> None:
    model, batch = make()
    with pytest.raises(ValueError, match="'float16' is not a precision"):
        effects(model, batch, dtype="float16")
    with pytest.raises(ValueError, match="'half' is not a way to change a unit"):
        effects(model, batch, how="half")
    with pytest.raises(ValueError, match="L9"):
        effects(model, batch, ["L9.H0"])
    with pytest.raises(ValueError, match="at least 2 prompts"):
        effects(model, Batch(batch.inputs, batch.at, batch.answer).take([0]), how="resample")
    with pytest.raises(ValueError, match="no corrupt prompts"):
        effects(model, Batch(batch.inputs, batch.at, batch.answer), how="restore")


def test_the_method_passes_its_fields_on() -> None:
    model, batch = make()
    rounded = Ablation(value="zero", dtype="bfloat16", units=("L0.H1", "L1.H2"), variants=2).score(model, batch)
    found = effects(model, batch, ["L0.H1", "L1.H2"], "zero", dtype="bfloat16", variants=2)
    assert rounded["L1.H2"] == pytest.approx(float(found.of("L1.H2").mean()), abs=1e-6)
