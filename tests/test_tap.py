"""A tap leaves the model and its attention as they are, keeps what was asked for, and says what it cannot give."""

import copy
import gc
import sys
import warnings
import weakref

import pytest
import torch
from families import ALL, FAMILIES, SILENT
from tapping import close, named, stacks

from headwise.anatomy import anatomy
from headwise.do import Zero, do
from headwise.tap import tap

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
SDPA = [n for n in FAMILIES if n not in ("gemma2", "gpt_oss")]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_tap_of_z_q_k_v_keeps_the_models_own_attention(name, padded, monkeypatch):
    family = FAMILIES[name]
    if padded and family.kind == "vision":
        return
    model, inputs = family.build(), family.inputs(padded=padded)
    with torch.no_grad():
        plain = model(**inputs)[0]
        with tap(model, "z"):  # the self-check opens attention once, at first use
            pass
        calls = []
        sdpa = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr("headwise.listen.attend_openly", lambda *a, **k: pytest.fail("attention was opened"))
        with tap(model, *[named(s, k) for s in stacks(model) for k in "zqkv"]):
            with monkeypatch.context() as patch:
                patch.setattr(
                    torch.nn.functional,
                    "scaled_dot_product_attention",
                    lambda *a, **k: calls.append(1) or sdpa(*a, **k),
                )
                tapped = model(**inputs)[0]
    assert torch.equal(plain, tapped)
    assert len(calls) == (len(anatomy(model).by_place) if name in SDPA else 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tap_of_z_on_an_eager_model_changes_no_bit(name):
    family = FAMILIES[name]
    model, inputs = family.build("eager"), family.inputs()
    with torch.no_grad():
        plain = model(**inputs)[0]
        with tap(model, "z", "resid_post"):
            assert torch.equal(model(**inputs)[0], plain)
        with tap(model, "pattern"):
            close(model(**inputs)[0], plain, 1e-4)


def snapshot(model):
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    own = [getattr(c, "_attn_implementation", None) for c in configs]
    inner = [
        getattr(getattr(c, k), "_attn_implementation", None) for c in configs for k in getattr(c, "sub_configs", ())
    ]
    return hooks, own, inner, model.config.to_dict()


@pytest.mark.parametrize("name", ALL)
def test_the_model_is_as_before(name):
    family = ALL[name]
    model, inputs = family.build(), family.inputs()
    next(model.children()).train()  # a mode set on a part must survive
    before, weights = snapshot(model), copy.deepcopy(model.state_dict())
    kinds = [k for k in ("pattern", "z", "resid_mid", "resid_post", "mlp") if anatomy(model).offers(k)]
    with torch.no_grad(), do(model, Zero("L1.H2" if 1 in anatomy(model).layers else "L3.H2")), tap(model, *kinds):
        model(**inputs)
    assert snapshot(model) == before
    with pytest.raises(ZeroDivisionError), tap(model, "z"), tap(model, *kinds), do(model, Zero("L*.H1")):
        model(**inputs)
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), tap(model, *kinds, reduce=lambda value: 1 / 0):
        model(**inputs)
    with (
        pytest.raises(ValueError, match="before the start"),
        torch.no_grad(),
        tap(model, "L1.z" if 1 in anatomy(model).layers else "L3.z", "z", positions=[-999]),
    ):
        model(**inputs)
    assert snapshot(model) == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("name", SILENT)
def test_types_that_never_call_the_interface_give_z_and_say_what_they_lack(name):
    family = SILENT[name]
    model, inputs = family.build(), family.inputs()
    body = anatomy(model)
    lacks = {line.split(":")[0] for line in body.lacks()}
    assert {"q", "k", "v", "scores", "pattern", "q_pre", "k_pre"} <= lacks and body.offers("z")
    with torch.no_grad():
        plain = model(**inputs)[0]
        with tap(model, "z", "attn") as t:
            assert torch.equal(model(**inputs)[0], plain)
    z, out = t["L1.z"], body.layer(1).out
    assert z.shape == (3, 10, 4, 8)
    close(out(z.flatten(2)), t["L1.attn"])
    with pytest.raises(ValueError, match="pattern: its attention never calls transformers' attention interface"):
        with tap(model, "pattern"):
            pass


@pytest.fixture
def llama():
    family = FAMILIES["llama"]
    return family.build(), family.inputs()


def test_chosen_positions_rows_and_heads(llama):
    model, inputs = llama
    with torch.no_grad():
        with tap(model, "z", "pattern", "resid_post", "k", "neurons") as t:
            model(**inputs)
        with tap(
            model, "L1.H2.z", "L0.H3.pattern", "resid_post", "L0.G1.k", "L1.N7", positions=[1, -2], rows=[2, 0]
        ) as u:
            model(**inputs)
        with tap(model, "L0.H1@-1", "L1.resid_post@3") as at:
            model(**inputs)
    rows, columns = torch.tensor([2, 0]), torch.tensor([1, 8])
    close(u["L1.H2.z"], t["L1.z"][rows][:, columns, 2])
    close(u["L0.H3.pattern"], t["L0.pattern"][rows][:, 3, columns])
    close(u["L1.resid_post"], t["L1.resid_post"][rows][:, columns])
    close(u["L0.G1.k"], t["L0.k"][rows][:, 1, columns])
    close(u["L1.N7"], t["L1.neurons"][rows][:, columns, 7])
    close(at["L0.H1@-1"], t["L0.z"][:, -1:, 1])
    close(at["L1.resid_post@3"], t["L1.resid_post"][:, 3:4])
    # Read back from a tap of everything.
    close(t["L0.H1@-1"], t["L0.z"][:, -1:, 1])
    close(t["L0.H3.pattern"], t["L0.pattern"][:, 3])
    close(t["L0.G1.k"], t["L0.k"][:, 1])


def test_reduce_is_applied_as_values_pass(llama):
    model, inputs = llama
    with torch.no_grad(), tap(model, "pattern") as t:
        model(**inputs)
    with torch.no_grad(), tap(model, "pattern", reduce=lambda p: p.diagonal(-1, -2, -1).mean(-1)) as u:
        model(**inputs)
    assert u.stack("pattern").shape == (2, 3, 4)
    close(u.stack("pattern"), t.stack("pattern").diagonal(-1, -2, -1).mean(-1))


def test_every_pass_or_the_last(llama):
    model, inputs = llama
    with torch.no_grad(), tap(model, "z", "L0.z", every=True) as t:
        model(**inputs)
        first = t["L0.z"]
        model(input_ids=inputs["input_ids"].flip(1))
    assert len(t.every("L0.z")) == 2 and t.every("L0.z")[0] is first
    assert not torch.equal(*t.every("L0.z"))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "site", ["z", "pattern", "resid_post", "mlp", "q", "v", "q_pre", "resid_mid", "neurons", "attn"]
)
def test_gradients_reach_what_was_tapped(llama, site, frozen):
    model, inputs = llama
    model.requires_grad_(not frozen)
    with tap(model, f"L0.{site}", grad=True) as t:
        loss = model(**inputs).logits[:, -1, 5].sum()
    (gradient,) = torch.autograd.grad(loss, t[f"L0.{site}"])
    assert gradient.shape == t[f"L0.{site}"].shape and gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ["gptj", "bloom", "mpt"])
def test_gradients_reach_z_of_silent_types(name):
    model, inputs = SILENT[name].build(), SILENT[name].inputs()
    with tap(model, "z", grad=True) as t:
        loss = model(**inputs).logits[:, -1, 5].sum()
    (gradient,) = torch.autograd.grad(loss, t["L0.z"])
    assert gradient.shape == (3, 10, 4, 8) and gradient.abs().sum() > 0


def test_values_are_detached_unless_asked(llama):
    model, inputs = llama
    with tap(model, "z", "resid_post") as t:
        model(**inputs)
    assert not t["L0.z"].requires_grad and not t["L1.resid_post"].requires_grad


@pytest.mark.parametrize(
    ("sites", "said"),
    [
        (["L9.z"], r"L9.z: this llama has the layers 0 to 1, not 9. Did you mean L1.z\?"),
        (["L1.H4.z"], r"layer 1 has heads 0 to 3, not 4. Did you mean L1.H3.z\?"),
        (["L1.G2.k"], r"heads 0 to 1, not 2. Did you mean L1.G1.k\?"),
        (["patern"], r"'patern' in 'patern' is not a kind of site: .* Did you mean 'pattern'\?"),
        (["cross.L1.z"], "has no cross stack"),
        (["enc.L1.z"], "has no enc stack"),
        (["L1.N48"], "neurons 0 to 47, not 48"),
        ([], "at least one site"),
    ],
)
def test_what_does_not_exist_is_named(llama, sites, said):
    model, _ = llama
    before = snapshot(model)
    with pytest.raises(ValueError, match=said), tap(model, *sites):
        pass
    assert snapshot(model) == before


def test_reading_what_was_not_tapped_names_the_nearest(llama):
    model, inputs = llama
    with torch.no_grad(), tap(model, "L0.z") as t:
        with pytest.raises(ValueError, match="no forward pass ran"):
            t["L0.z"]
        model(**inputs)
    with pytest.raises(ValueError, match=r"L1.z was not tapped; this tap reads L0.z. Did you mean L0.z\?"):
        t["L1.z"]


def test_attention_that_cannot_be_reproduced_is_refused(monkeypatch):
    model = FAMILIES["llama"].build("eager")
    module = sys.modules[type(model).__module__]
    own = module.eager_attention_forward

    def twisted(m, q, k, v, mask, scaling, **options):
        return own(m, q, k, v, mask, scaling=2 * scaling, **options)

    monkeypatch.setattr(module, "eager_attention_forward", twisted)
    inputs = FAMILIES["llama"].inputs()
    with pytest.raises(
        ValueError, match="LlamaForCausalLM computes attention in a way that headwise does not reproduce"
    ):
        with tap(model, "pattern"):
            pass
    with torch.no_grad():
        plain = model(**inputs)[0]
        with tap(model, "z") as t:  # z comes from the model's own attention and is right
            assert torch.equal(model(**inputs)[0], plain)
    assert t["L0.z"].shape == (3, 10, 4, 8)
    with do(model, Zero("L0.H1")), pytest.raises(ValueError, match="does not reproduce"), tap(model, "pattern"):
        pass


def test_a_mask_that_is_dropped_would_show(monkeypatch):
    """The mask function is registered with the attention function: padded logits stay right."""
    family = FAMILIES["qwen3"]
    model, inputs = family.build(), family.inputs(padded=True)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        plain = model(**inputs)[0]
        for site in ("z", "pattern"):
            with tap(model, site):
                close(model(**inputs)[0][real], plain[real], 1e-4)
        alone = model(input_ids=inputs["input_ids"][2:, 4:])[0]
    close(plain[2:, 4:], alone, 1e-4)


def test_taps_nest_and_only_the_asked_layers_open(llama, monkeypatch):
    model, inputs = llama
    from headwise import listen

    opened = []
    own = listen.attend_openly
    with torch.no_grad():
        plain = model(**inputs)[0]
        with tap(model, "z") as outer:
            monkeypatch.setattr(listen, "attend_openly", lambda m, *a, **k: opened.append(m) or own(m, *a, **k))
            with tap(model, "L1.pattern") as inner:
                close(model(**inputs)[0], plain)
            assert opened == [anatomy(model).layer(1).attention]
            assert torch.equal(model(**inputs)[0], plain) and len(opened) == 1
    assert inner["L1.pattern"].shape == (3, 4, 10, 10) and outer["L0.z"].shape == (3, 10, 4, 8)


def test_tap_under_generate_reads_columns_of_the_whole_sequence(llama):
    model, inputs = llama
    with torch.no_grad(), tap(model, "L1.z", "L1.pattern", every=True) as t:
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with torch.no_grad(), tap(model, "L1.z", "L1.pattern") as whole:
        model(input_ids=ids[:, :-1])
    close(torch.cat(t.every("L1.z"), 1), whole["L1.z"], 1e-4)
    close(t.every("L1.pattern")[-1], whole["L1.pattern"][:, :, -1:], 1e-4)
    with torch.no_grad(), tap(model, "L1.z", positions=[-1, 11]) as few:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    close(few["L1.z"], whole["L1.z"][:, 11:12], 1e-4)


def test_per_row_reduces_in_parts(llama):
    from headwise.tap import per_row
    from headwise.task import Batch

    model, inputs = llama
    batch = Batch(inputs, torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long))
    ours = per_row(model, batch, "pattern", lambda p: p[..., 0].mean(-1), rows=2)
    with torch.no_grad(), tap(model, "pattern") as t:
        model(**inputs)
    for layer in (0, 1):
        close(ours[layer], t[f"L{layer}.pattern"][..., 0].mean(-1))


def test_warnings_stay_quiet(llama):
    model, inputs = llama
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        with tap(model, "pattern", "z"):
            model(**inputs)
