"""Tapped values equal the model's own: its attentions, its hidden states, what plain hooks see."""

import sys

import pytest
import torch
from families import ALL, FAMILIES
from tapping import close, named, stacks
from torch import nn

from headwise.anatomy import anatomy
from headwise.tap import tap

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def own_outputs(family, inputs, **kwargs):
    """What the type's own eager attention says."""
    model = family.build("eager")
    with torch.no_grad():
        return model(**inputs, output_attentions=True, output_hidden_states=True, **kwargs)


def own_patterns(output, stack, layers, silent=False):
    names = {"": ("decoder_attentions", "attentions"), "enc": ("encoder_attentions",), "cross": ("cross_attentions",)}[
        stack
    ]
    found = next(value for name in names if (value := getattr(output, name, None)) is not None)
    found = [value for value in found if value is not None]
    assert len(found) == len(layers)
    return dict(zip(layers, found, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_pattern_equals_the_models_own(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs()
    own = own_outputs(family, inputs)
    for stack in stacks(model):
        with torch.no_grad(), tap(model, named(stack, "pattern")) as t:
            output = model(**inputs)
        ours = t.by_layer("pattern", stack)
        for layer, pattern in own_patterns(own, stack, anatomy(model).numbers(stack)).items():
            close(ours[layer], pattern)
        close(output[0], own[0], 1e-4)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.kind != "vision"])
def test_pattern_of_real_rows_under_left_padding(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs(padded=True)
    own = own_outputs(family, inputs)
    plain = model(**inputs)[0]
    real = inputs["attention_mask"].bool()
    for stack in stacks(model):
        with torch.no_grad(), tap(model, named(stack, "pattern")) as t:
            output = model(**inputs)
        for layer, pattern in own_patterns(own, stack, anatomy(model).numbers(stack)).items():
            ours = t.by_layer("pattern", stack)[layer]
            if family.kind == "both" and stack != "enc":
                close(ours, pattern)
            else:
                close(ours.transpose(1, 2)[real], pattern.transpose(1, 2)[real])
        rows = torch.ones_like(output[0][..., 0], dtype=torch.bool) if family.kind == "both" else real
        close(output[0][rows], plain[rows], 1e-4)


@pytest.mark.parametrize("name", ALL)
def test_residual_stream_equals_hidden_states(name):
    family = ALL[name]
    model, inputs = family.build(), family.inputs()
    with torch.no_grad():
        own = model(**inputs, output_hidden_states=True)
    for stack in {"": [""], "both": ["", "enc"]}["both" if family.kind == "both" else ""]:
        key = {
            "": "decoder_hidden_states" if family.kind == "both" else "hidden_states",
            "enc": "encoder_hidden_states",
        }
        states = getattr(own, key[stack])
        prefix = f"{stack}.L*." if stack else ""
        with torch.no_grad(), tap(model, f"{prefix}resid_pre", f"{prefix}resid_post") as t:
            model(**inputs)
        before, after = t.by_layer("resid_pre", stack), t.by_layer("resid_post", stack)
        assert len(before) == len(states) - 1
        for number, state in enumerate(states[:-1]):
            close(before[number], state)
            if number:
                close(after[number - 1], state)


@pytest.mark.parametrize("name", ALL)
def test_sublayers_equal_independent_hooks(name):
    family = ALL[name]
    model, inputs = family.build(), family.inputs()
    body = anatomy(model)
    names = {module: key for key, module in model.named_modules()}
    for (stack, number), layer in body.by_place.items():
        seen: dict = {}

        def note(key, seen=seen):
            return lambda module, args, output=None: seen.update({key: args[0] if output is None else output})

        hooks = [layer.out.register_forward_hook(note("attn")), layer.mlp.register_forward_hook(note("mlp"))]
        hooks += [layer.out.register_forward_pre_hook(note("z"))]
        hooks += [layer.down.register_forward_pre_hook(note("neurons"))] if layer.down is not None else []
        prefix = f"{stack}." if stack else ""
        kinds = [k for k in ("z", "attn", "mlp", "neurons", "resid_pre", "resid_mid", "resid_post") if layer.offers(k)]
        sites = {kind: f"{prefix}L{number}.{kind}" for kind in kinds}
        with torch.no_grad(), tap(model, *sites.values()) as t:
            model(**inputs)
        for hook in hooks:
            hook.remove()
        got = {kind: t[site] for kind, site in sites.items()}
        assert got["z"].shape[2:] == (layer.heads, layer.value_dim), names[layer.attention]
        if name not in ("qwen3_next", "qwen3_5"):  # these gate z before the output projection
            close(got["z"].flatten(2).view_as(seen["z"]), seen["z"])
        for kind in ("attn", "mlp", "neurons"):
            if kind in got:
                own = seen[kind][0] if isinstance(seen[kind], tuple) else seen[kind]
                close(got[kind].reshape(own.shape), own)


PRE_NORM = "llama qwen2 qwen3 mistral mixtral gpt2 phi3 opt gpt_oss deepseek_v3 qwen3_next qwen3_5 modernbert vit"


@pytest.mark.parametrize("name", [*PRE_NORM.split(), "bloom", "mpt", "xglm"])
def test_the_stream_is_a_sum(name):
    family = ALL[name]
    model, inputs = family.build(), family.inputs()
    layers = anatomy(model).layers
    with torch.no_grad(), tap(model, "resid_pre", "attn", "resid_mid", "mlp", "resid_post") as t:
        model(**inputs)
    for n in layers:
        attn = t[f"L{n}.attn"]
        close(t[f"L{n}.resid_pre"] + attn, t[f"L{n}.resid_mid"], 1e-4)
        assert t[f"L{n}.mlp"].shape == attn.shape
        close(t[f"L{n}.resid_mid"] + t[f"L{n}.mlp"], t[f"L{n}.resid_post"], 1e-4)


@pytest.mark.parametrize("name", ["t5", "bart", "bert", "roberta", "gemma2", "gemma3", "olmo2"])
def test_resid_mid_of_other_blocks_is_what_the_mlp_reads(name):
    """Writing resid_mid must do the same as adding the difference to what comes before it."""
    family = ALL[name]
    model, inputs = family.build(), family.inputs()
    with torch.no_grad(), tap(model, "resid_mid", "resid_post", "mlp") as t:
        model(**inputs)
    assert t["L0.resid_mid"].shape == t["L0.resid_post"].shape
    if name == "t5":
        close(t["L0.resid_mid"] + t["L0.mlp"], t["L0.resid_post"], 1e-4)
    layer = anatomy(model).layer(0)
    if name in ("bart", "bert", "roberta"):
        last = [m for m in layer.block.modules() if isinstance(m, nn.LayerNorm)][-1]
        close(last(t["L0.resid_mid"] + t["L0.mlp"]), t["L0.resid_post"], 1e-4)
    if name in ("gemma2", "gemma3", "olmo2"):
        norm = layer.block.post_feedforward_layernorm
        close(t["L0.resid_mid"] + norm(t["L0.mlp"]), t["L0.resid_post"], 1e-4)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("t5", "gpt_oss", "gemma2", "gemma3")])
def test_pattern_follows_from_q_and_k(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs()
    layer = anatomy(model).layer(anatomy(model).layers[-1])
    n = layer.number
    with torch.no_grad(), tap(model, "q", "k", "v", "pattern", "scores", "z") as t:
        model(**inputs)
    groups = layer.heads // layer.kv_heads
    q, k, v = t[f"L{n}.q"], t[f"L{n}.k"], t[f"L{n}.v"]
    assert q.shape == (3, layer.heads, q.shape[2], layer.head_dim) and k.shape[1] == v.shape[1] == layer.kv_heads
    scaling = getattr(layer.attention, "scaling", None) or layer.head_dim**-0.5
    scaling = 1.0 if name == "opt" else scaling
    scores = q @ k.repeat_interleave(groups, 1).mT * scaling
    hidden = t[f"L{n}.scores"] < -1e30
    assert hidden.any() == (family.kind == "decoder" or name in ("bart", "modernbert"))
    pattern = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    close(t[f"L{n}.pattern"], pattern, 1e-4)
    close(t[f"L{n}.z"], (pattern @ v.repeat_interleave(groups, 1)).transpose(1, 2), 1e-4)


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma2", "gemma3", "olmo2", "qwen3_next", "qwen3_5"]
)
def test_rotating_q_pre_gives_q(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs()
    layer = anatomy(model).layer(anatomy(model).layers[-1])
    n, seen = layer.number, {}
    hook = layer.attention.register_forward_pre_hook(
        lambda m, a, k: seen.update(rotary=k.get("position_embeddings")), with_kwargs=True
    )
    with torch.no_grad(), tap(model, "q_pre", "k_pre", "q", "k") as t:
        model(**inputs)
    hook.remove()
    rotate = sys.modules[type(layer.attention).__module__].apply_rotary_pos_emb
    q, k = rotate(t[f"L{n}.q_pre"], t[f"L{n}.k_pre"], *seen["rotary"])
    close(q, t[f"L{n}.q"])
    close(k, t[f"L{n}.k"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_oss", "deepseek_v3", "bert", "t5", "vit"])
def test_half_precision(name, dtype):
    family = FAMILIES[name]
    model, inputs = family.build(dtype=dtype), family.inputs()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    own = family.build("eager", dtype=dtype)
    with torch.no_grad():
        patterns = own_patterns(own(**inputs, output_attentions=True), "", anatomy(model).layers)
        plain = model(**inputs)[0]
        with tap(model, "pattern", "z") as t:
            open_ = model(**inputs)[0]
        with tap(model, "z"):
            assert torch.equal(model(**inputs)[0], plain)
    close(t["L0.pattern"].float(), patterns[0].float(), 2e-2)
    assert t["L0.pattern"].dtype == t["L0.z"].dtype == dtype
    if name not in ("deepseek_v3", "gpt_oss"):  # a router may tip over
        assert (open_ - plain).abs().max() <= 0.1 * plain.abs().max()
