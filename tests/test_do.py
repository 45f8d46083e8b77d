"""Every intervention equals a naive twin: own hooks, edited weights, a mask written by hand."""

import copy
import sys

import pytest
import torch
from families import ALL, FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headwise.anatomy import anatomy
from headwise.do import Add, Cut, Freeze, Mean, Patch, Project, Resample, Scale, Zero, do
from headwise.tap import tap

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
HEAD = 8


def close(left, right, tolerance=1e-4):
    torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build()


@pytest.fixture
def inputs():
    return FAMILIES["llama"].inputs()


def run(model, inputs, *interventions):
    with torch.no_grad(), do(model, *interventions):
        return model(**inputs)[0]


def values(model, inputs, *sites):
    with torch.no_grad(), tap(model, *sites) as t:
        model(**inputs)
    return t


def with_input_hook(model, module, edit, inputs):
    """The naive twin: the input of a module, edited by hand."""
    hook = module.register_forward_pre_hook(lambda m, args: (edit(args[0].clone()), *args[1:]))
    try:
        with torch.no_grad():
            return model(**inputs)[0]
    finally:
        hook.remove()


def with_output_hook(model, module, edit, inputs):
    def after(m, args, output):
        return (edit(output[0].clone()), *output[1:]) if isinstance(output, tuple) else edit(output.clone())

    hook = module.register_forward_hook(after)
    try:
        with torch.no_grad():
            return model(**inputs)[0]
    finally:
        hook.remove()


def without_head(model, layer, index):
    """A copy whose output projection has no column for the head: the head is gone from the weights."""
    twin = copy.deepcopy(model)
    place = anatomy(twin).layer(layer)
    size = place.value_dim
    with torch.no_grad():
        if type(place.out).__name__ == "Conv1D":
            place.out.weight[index * size : (index + 1) * size] = 0
        else:
            place.out.weight[:, index * size : (index + 1) * size] = 0
    return twin


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_zero_equals_a_head_cut_from_the_weights(name, padded):
    family = ALL[name]
    if padded and family.kind == "vision":
        return
    model, inputs = family.build(), family.inputs(padded=padded)
    layer = anatomy(model).layers[0]
    with torch.no_grad():
        twin = without_head(model, layer, 2)(**inputs)[0]
        plain = model(**inputs)[0]
    ours = run(model, inputs, Zero(f"L{layer}.H2"))
    real = inputs["attention_mask"].bool() if padded and family.kind != "both" else slice(None)
    close(ours[real], twin[real])
    assert not torch.allclose(ours, plain, atol=1e-3)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("stack", ["enc", "cross"])
def test_zero_in_other_stacks(name, stack):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs(padded=True)
    twin = copy.deepcopy(model)
    place = anatomy(twin).layer(1, stack)
    with torch.no_grad():
        place.out.weight[:, 8:16] = 0
        close(run(model, inputs, Zero(f"{stack}.L1.H1")), twin(**inputs)[0])


KINDS = ["z", "attn", "mlp", "neurons", "resid_pre", "resid_post", "q_pre", "k_pre"]


def naive(model, kind, edit, inputs):
    """Edit a site of layer 1 of a llama by a plain hook; `edit` takes [B, T, ...] with heads apart."""
    block = model.model.layers[1]
    attention = block.self_attn

    def heads(value):
        return edit(value.unflatten(-1, (-1, HEAD)).transpose(1, 2)).transpose(1, 2).flatten(-2)

    if kind == "z":
        return with_input_hook(model, attention.o_proj, lambda v: edit(v.unflatten(-1, (-1, HEAD))).flatten(-2), inputs)
    if kind == "neurons":
        return with_input_hook(model, block.mlp.down_proj, edit, inputs)
    if kind == "resid_pre":
        return with_input_hook(model, block, edit, inputs)
    if kind in ("q_pre", "k_pre"):
        return with_output_hook(model, getattr(attention, f"{kind[0]}_proj"), heads, inputs)
    module = {"attn": attention.o_proj, "mlp": block.mlp, "resid_post": block}[kind]
    return with_output_hook(model, module, edit, inputs)


def twins(source, mean, directions):
    """Each intervention beside what it does to a value, written out."""
    basis = torch.linalg.qr(directions.T).Q
    return {
        "zero": (lambda s, **k: Zero(s, **k), torch.zeros_like),
        "scale": (lambda s, **k: Scale(s, -1.5, **k), lambda v: v * -1.5),
        "add": (lambda s, **k: Add(s, directions[0], **k), lambda v: v + directions[0]),
        "project": (lambda s, **k: Project(s, directions, **k), lambda v: v - v @ basis @ basis.T),
        "patch": (lambda s, **k: Patch(s, source, **k), lambda v: source),
        "mean": (lambda s, **k: Mean(s, source, **k), lambda v: mean.expand_as(v)),
    }


@pytest.mark.parametrize(
    "chosen", [{}, {"rows": [2, 0]}, {"positions": [-1, 3]}, {"rows": [1], "positions": [0]}], ids=str
)
@pytest.mark.parametrize("what", ["zero", "scale", "add", "project", "patch", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_interventions_equal_plain_hooks(llama, inputs, kind, what, chosen):
    site = f"L1.{kind}"
    other = FAMILIES["llama"].inputs(seed=1)
    source = values(llama, other, site)[site]
    time = 2 if kind in ("q_pre", "k_pre") else 1
    mean = source.mean((0, time), keepdim=True)
    directions = torch.randn(2, source.shape[-1], generator=torch.Generator().manual_seed(0))
    make, change = twins(source, mean, directions)[what]

    def edit(value):
        new, whole = value.clone(), change(value)
        for row in chosen.get("rows", range(3)):
            for column in chosen.get("positions", range(10)):
                at = (row, slice(None), column) if time == 2 else (row, column)
                new[at] = whole[at]
        return new

    close(run(llama, inputs, make(site, **chosen)), naive(llama, kind, edit, inputs))


@pytest.mark.parametrize("what", ["zero", "scale", "add", "project", "patch", "mean"])
@pytest.mark.parametrize("site", ["L1.H3.z", "L1.H3.q_pre", "L1.G1.k_pre"])
def test_interventions_on_one_head(llama, inputs, site, what):
    kind, index = site.split(".")[2], int(site.split(".")[1][1])
    axis = 2 if kind == "z" else 1
    source = values(llama, FAMILIES["llama"].inputs(seed=1), site)[site]
    mean = source.mean((0, 1))
    directions = torch.randn(2, HEAD, generator=torch.Generator().manual_seed(0))
    make, change = twins(source, mean, directions)[what]

    def edit(value):
        parts = list(value.unbind(axis))
        parts[index] = change(parts[index])
        return torch.stack(parts, axis)

    close(run(llama, inputs, make(site)), naive(llama, kind, edit, inputs))


def eager_twin(monkeypatch, edit):
    """A llama whose own eager attention hands q, k, v, scores and pattern of layer 1 to `edit`."""
    model = FAMILIES["llama"].build("eager")
    file = sys.modules[type(model).__module__]

    def attend(module, q, k, v, mask, scaling, **_):
        def see(kind, value):
            return edit(kind, value) if module.layer_idx == 1 else value

        q, k, v = see("q", q), see("k", k), see("v", v)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = see("scores", q @ k.mT * scaling + mask)
        pattern = see("pattern", scores.softmax(-1))
        return (pattern @ v).transpose(1, 2), pattern

    monkeypatch.setattr(file, "eager_attention_forward", attend)
    return model


@pytest.mark.parametrize("kind", ["q", "k", "v", "scores", "pattern"])
@pytest.mark.parametrize("what", ["zero", "scale", "patch", "head", "rows"])
def test_interventions_inside_attention(llama, inputs, kind, what, monkeypatch):
    source = values(llama, FAMILIES["llama"].inputs(seed=1), kind)[f"L1.{kind}"]
    letter = "G" if kind in "kv" else "H"
    edits = {
        "zero": (Zero(f"L1.{kind}"), torch.zeros_like),
        "scale": (Scale(f"L1.{kind}", 0.5, positions=[2, -1]), None),
        "patch": (Patch(f"L1.{kind}", source), lambda v: source),
        "head": (Patch(f"L1.{letter}1.{kind}", source[:, 1]), None),
        "rows": (Zero(f"L1.{kind}", rows=[1]), None),
    }
    one, change = edits[what]
    ours = run(llama, inputs, one)

    def edit(passing, value):
        if passing != kind:
            return value
        if change is not None:
            return change(value)
        new = value.clone()
        if what == "scale":
            new[:, :, [2, -1]] *= 0.5
        elif what == "head":
            new[:, 1] = source[:, 1]
        else:
            new[1] = 0
        return new

    twin = eager_twin(monkeypatch, edit)
    with torch.no_grad():
        close(ours, twin(**inputs)[0])


@pytest.mark.parametrize("padded", [False, True])
def test_cut_equals_a_mask_by_hand(llama, padded, monkeypatch):
    inputs = FAMILIES["llama"].inputs(padded=padded)
    ours = run(llama, inputs, Cut("L1", keys=[5, -2], queries=[6, 9]), Cut("L1.H2", keys=[7], rows=[0]))

    def edit(kind, value):
        if kind == "scores":
            value = value.clone()
            for query in (6, 9):
                value[:, :, query, [5, 8]] = -torch.inf
            value[0, 2, :, 7] = -torch.inf
        return value

    twin = eager_twin(monkeypatch, edit)
    real = inputs.get("attention_mask", torch.ones(3, 10)).bool()
    with torch.no_grad():
        close(ours[real], twin(**inputs)[0][real])


def test_a_query_with_nothing_left_to_see_takes_nothing(llama, inputs):
    with torch.no_grad(), do(llama, Cut("L1.H1", keys=[0, 1, 2])), tap(llama, "L1.z", "L1.pattern") as t:
        llama(**inputs)
    assert torch.equal(t["L1.z"][:, :3, 1], torch.zeros(3, 3, HEAD))
    close(t["L1.pattern"][:, 1, 3:].sum(-1), torch.ones(3, 7))
    assert t["L1.pattern"][:, 1, :, :3].abs().max() == 0 and (t["L1.z"][:, :3, 0] != 0).all()


def test_cut_survives_a_head_that_saw_only_what_is_cut(llama, inputs):
    """A pattern so sharp that nothing else is left in float32: cutting after the softmax would give zero."""
    with torch.no_grad(), do(llama, Scale("L1.q", 500.0)), tap(llama, "L1.pattern") as sharp:
        llama(**inputs)
    key = int(sharp["L1.pattern"][0, 0, -1].argmax())
    with torch.no_grad(), do(llama, Scale("L1.q", 500.0), Cut("L1.H0", keys=[key])), tap(llama, "L1.pattern") as t:
        llama(**inputs)
    close(t["L1.pattern"][0, 0, -1].sum(), torch.tensor(1.0))
    assert t["L1.pattern"][0, 0, -1, key] == 0


def test_cut_with_a_sink_leaves_the_sink_its_share():
    family = FAMILIES["gpt_oss"]
    model, inputs = family.build(), family.inputs()
    with torch.no_grad():
        anatomy(model).layer(1).attention.sinks.normal_()
    with torch.no_grad(), do(model, Cut("L1", keys=[8], queries=[9])), tap(model, "L1.pattern", "L1.scores") as t:
        model(**inputs)
    sinks = anatomy(model).layer(1).attention.sinks
    scores = torch.cat([t["L1.scores"][:, :, 9], sinks.expand(3, -1)[..., None]], -1).clone()
    scores[..., 8] = -torch.inf
    close(t["L1.pattern"][:, :, 9], scores.softmax(-1)[..., :-1])


def test_freeze_keeps_the_pattern_of_another_run(llama, inputs):
    other = FAMILIES["llama"].inputs(seed=1)
    clean = values(llama, other, "pattern")
    with torch.no_grad(), do(llama, Freeze("L1.H2", clean), Freeze("L0", clean)), tap(llama, "pattern") as t:
        llama(**inputs)
    close(t["L1.H2.pattern"], clean["L1.H2.pattern"])
    close(t["L0.pattern"], clean["L0.pattern"])
    assert not torch.allclose(t["L1.H1.pattern"], clean["L1.H1.pattern"], atol=1e-3)


def test_resample_takes_other_rows(llama, inputs):
    own = values(llama, inputs, "L1.z")["L1.z"]
    with torch.no_grad(), do(llama, Resample("L1.H2", seed=3)), tap(llama, "L1.z") as t:
        llama(**inputs)
    matches = [[torch.allclose(t["L1.z"][i, :, 2], own[j, :, 2], atol=1e-5) for j in range(3)] for i in range(3)]
    assert all(sum(row) == 1 for row in matches) and not any(matches[i][i] for i in range(3))
    source = values(llama, FAMILIES["llama"].inputs(rows=5, seed=4), "z")
    with torch.no_grad(), do(llama, Resample("L1.H2", source)), tap(llama, "L1.z") as t:
        llama(**inputs)
    for row in t["L1.z"][:, :, 2]:
        assert any(torch.allclose(row, one, atol=1e-6) for one in source["L1.z"][:, :, 2])


@pytest.mark.parametrize("name", [n for n in ALL if anatomy(ALL[n].build()).offers("resid_mid")])
def test_writing_resid_mid_writes_the_stream(name):
    """A write of resid_mid equals the same addition at the attention's output, where nothing stands between."""
    family = ALL[name]
    model, inputs = family.build(), family.inputs()
    layer = anatomy(model).layers[-1]
    width = values(model, inputs, f"L{layer}.resid_mid")[f"L{layer}.resid_mid"].shape[-1]
    push = torch.randn(width, generator=torch.Generator().manual_seed(1))
    ours = run(model, inputs, Add(f"L{layer}.resid_mid", push))
    with torch.no_grad():
        plain = model(**inputs)[0]
    assert not torch.allclose(ours, plain, atol=1e-3)
    with torch.no_grad(), do(model, Add(f"L{layer}.resid_mid", push)), tap(model, f"L{layer}.resid_mid") as t:
        model(**inputs)
    own = values(model, inputs, f"L{layer}.resid_mid")[f"L{layer}.resid_mid"]
    close(t[f"L{layer}.resid_mid"], own + push)
    if name in ("gemma2", "gemma3", "olmo2", "bert", "roberta", "bart"):  # a norm stands between
        return
    site = f"cross.L{layer}.attn" if family.kind == "both" else f"L{layer}.attn"
    close(ours, run(model, inputs, Add(site, push)), 1e-3)


def test_resid_mid_then_resid_post(llama, inputs):
    push = torch.randn(32)
    target = values(llama, FAMILIES["llama"].inputs(seed=1), "resid_post")
    ours = run(llama, inputs, Patch("L0.resid_post", target), Add("L0.resid_mid", push))
    close(ours, run(llama, inputs, Patch("L0.resid_post", target)))


def test_blocks_nest_and_the_inner_acts_last(llama, inputs):
    with torch.no_grad(), do(llama, Add("L0.H1", torch.ones(HEAD))), do(llama, Scale("L0.H1", 2.0)):
        nested = llama(**inputs)[0]
    close(nested, run(llama, inputs, Add("L0.H1", torch.ones(HEAD)), Scale("L0.H1", 2.0)))
    assert not torch.allclose(
        nested, run(llama, inputs, Scale("L0.H1", 2.0), Add("L0.H1", torch.ones(HEAD))), atol=1e-3
    )


@pytest.mark.parametrize("site", ["L0.H1.z", "L0.H1.pattern", "L0.resid_post", "L0.mlp"])
def test_a_tap_sees_what_was_written_before_it(llama, inputs, site):
    with torch.no_grad(), tap(llama, site) as before, do(llama, Scale(site, 3.0)), tap(llama, site) as after:
        llama(**inputs)
    close(after[site], 3 * before[site])


def test_rows_of_one_batch_carry_their_own_interventions(llama):
    one = FAMILIES["llama"].inputs(rows=1)
    batch = {key: value.expand(9, -1) for key, value in one.items()}
    units = [f"L{layer}.H{index}" for layer in (0, 1) for index in range(4)]
    together = run(llama, batch, *[Zero(unit, rows=[row]) for row, unit in enumerate(units)])
    for row, unit in enumerate(units):
        close(together[row : row + 1], run(llama, one, Zero(unit)))
    with torch.no_grad():
        close(together[8:], llama(**one)[0])


def test_gradients_flow_through_what_is_written(llama, inputs):
    weight = llama.model.layers[0].self_attn.v_proj.weight
    twin = without_head(llama, 1, 2)

    def gradient(model, *interventions):
        model.zero_grad()
        with do(model, *interventions):
            model(**inputs).logits[:, -1, 3].sum().backward()
        return model.model.layers[0].self_attn.v_proj.weight.grad.clone()

    close(gradient(llama, Zero("L1.H2")), gradient(twin))
    push = torch.zeros(HEAD, requires_grad=True)
    with do(llama, Add("L0.H1", push)):
        loss = llama(**inputs).logits[:, -1, 3].sum()
    (slope,) = torch.autograd.grad(loss, push)
    step = 1e-2 * torch.eye(HEAD)[4]
    up, down = (run(llama, inputs, Add("L0.H1", sign * step))[:, -1, 3].sum() for sign in (1, -1))
    close(slope[4], (up - down) / 2e-2, 2e-2)
    assert weight.grad is not None
    llama.zero_grad()


@pytest.mark.parametrize("site", ["L1.pattern", "L1.scores", "L1.q", "L1.resid_mid", "L1.k_pre"])
def test_gradients_by_finite_difference(site):
    model, inputs = FAMILIES["llama"].build(dtype=torch.float64), FAMILIES["llama"].inputs()
    with torch.no_grad(), tap(model, site) as t:
        model(**inputs)
    push = torch.zeros_like(t[site], requires_grad=True)
    with do(model, Add(site, push)):
        loss = model(**inputs).logits[:, -1, 3].sum()
    (slope,) = torch.autograd.grad(loss, push)
    at = tuple(int(i) for i in (slope == slope.abs().max()).nonzero()[0]) if slope.max() == slope.abs().max() else None
    at = at or tuple(int(i) for i in (slope == slope.min()).nonzero()[0])
    step = torch.zeros_like(push)
    step[at] = 1e-2  # norms and softmax run in float32 also in a float64 model
    up, down = (run(model, inputs, Add(site, sign * step))[:, -1, 3].sum() for sign in (1, -1))
    close(slope[at], (up - down) / 2e-2, 5e-3)


def without_cache(model, inputs, steps, *interventions):
    """Greedy tokens, each from a whole pass over prompt and answer so far. The caller gives absolute positions."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    logits = []
    for _ in range(steps):
        more = {} if mask is None else {"attention_mask": mask}
        if mask is not None:
            more["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad(), do(model, *interventions):
            out = model(input_ids=ids, **more).logits[:, -1]
        logits.append(out)
        ids = torch.cat([ids, out.argmax(-1, keepdim=True)], 1)
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids, torch.stack(logits, 1)


def generated(model, inputs, steps, *interventions, **options):
    with torch.no_grad(), do(model, *interventions):
        out = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True,
            eos_token_id=None, pad_token_id=0, **options,
        )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


DONE = {
    "zero": lambda s: [Zero(f"L{s}.H1")],
    "prompt": lambda s: [Zero(f"L{s}.H1", positions=[0, 9]), Scale("L1.resid_post", 1.5, positions=[4])],
    "generated": lambda s: [Zero(f"L{s}.H2", positions=[11, 12])],
    "inside": lambda s: [
        Scale(f"L{s}.q", 2.0),
        Scale(f"L{s}.G0.k", 0.5),
        Add(f"L{s}.G1.v", torch.ones(1), positions=[2, 11]),
    ],
    "cut": lambda s: [Cut(f"L{s}", keys=[8, 9, 11], rows=[0, 2])],
    "stream": lambda s: [Add(f"L{s}.resid_mid", torch.linspace(-1, 1, 32)), Zero(f"L{s}.mlp", rows=[1])],
    "before": lambda s: [Scale(f"L{s}.q_pre", 0.5), Scale(f"L{s}.k_pre", 2.0, positions=[3, 10])],
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("what", DONE)
@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma2", "qwen3", "gpt2", "gpt_oss", "qwen3_5", "opt", "deepseek_v3"]
)
def test_generation_equals_recomputing_everything(name, what, padded):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs(padded=padded)
    body = anatomy(model)
    layer = body.layers[-1]
    if what == "before" and not body.offers("k_pre"):
        return
    interventions = DONE[what](layer)
    ids, logits = generated(model, inputs, 4, *interventions)
    slow, twin = without_cache(model, inputs, 4, *interventions)
    close(logits, twin, 1e-3)
    assert torch.equal(ids, slow)
    with torch.no_grad():
        assert not torch.allclose(logits, generated(model, inputs, 4)[1], atol=1e-3)


def test_generation_with_a_static_cache_and_negative_positions(llama, inputs):
    asked = [Zero("L1.H1", positions=[-1]), Cut("L1.H2", keys=[-3, 11]), Scale("L0.G1.v", 2.0, positions=[-2, 11])]
    absolute = [Zero("L1.H1", positions=[9]), Cut("L1.H2", keys=[7, 11]), Scale("L0.G1.v", 2.0, positions=[8, 11])]
    ids, twin = without_cache(llama, inputs, 4, *absolute)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        close(generated(llama, inputs, 4, *asked, **options)[1], twin, 1e-3)


def test_a_past_made_before_the_block(llama, inputs):
    ids = inputs["input_ids"]
    with torch.no_grad():
        past = llama(input_ids=ids[:, :6], use_cache=True).past_key_values
        with do(llama, Zero("L1.H1", positions=[-1, 7])):
            ours = llama(input_ids=ids[:, 6:], past_key_values=past).logits
    close(ours, run(llama, inputs, Zero("L1.H1", positions=[9, 7]))[:, 6:])


@pytest.mark.parametrize("name", ["llama", "t5", "bart", "mistral"])
def test_beam_search_runs(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs(padded=True)
    inputs.pop("decoder_input_ids", None)
    with torch.no_grad(), do(model, Zero("L1.H1"), Scale("L0.mlp", 0.5, positions=[-1]), Cut("L1", keys=[0])):
        out = model.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0)
    assert len(out) == 3


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generation_of_encoder_decoders(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs()
    start = inputs.pop("decoder_input_ids")[:, :2]
    start[:, 0] = model.config.decoder_start_token_id
    one = [Zero("L1.H1", positions=[1, 3]), Scale("enc.L0.H2", 2.0, positions=[-1]), Cut("cross.L1.H0", keys=[2, -1])]
    with torch.no_grad(), do(model, *one):
        ids = model.generate(**inputs, decoder_input_ids=start, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        again = model(**inputs, decoder_input_ids=ids[:, :-1]).logits
    # Forced and forbidden tokens aside, every step must choose what the whole pass chooses.
    chosen = again.clone()
    chosen[..., 2 if name == "bart" else 1] = -torch.inf
    assert torch.equal(chosen.argmax(-1)[:, start.shape[1] - 1 : ids.shape[1] - 1], ids[:, start.shape[1] :])


def test_freeze_under_generation(llama, inputs):
    clean = values(llama, FAMILIES["llama"].inputs(seed=1), "L1.pattern")
    _, twin = without_cache(llama, inputs, 4, Freeze("L1.H1", clean))
    close(generated(llama, inputs, 4, Freeze("L1.H1", clean))[1], twin, 1e-3)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["zero", "scale", "add"]),
            st.integers(0, 1),
            st.integers(0, 3),
            st.none() | st.lists(st.integers(-3, 2), min_size=1, max_size=3),
            st.none() | st.lists(st.integers(-10, 9), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_random_interventions_equal_hooks(llama, plan):
    inputs = FAMILIES["llama"].inputs()
    changes = {"zero": lambda v: v * 0, "scale": lambda v: v * 1.7, "add": lambda v: v + 0.5}
    made = {"zero": lambda s, **k: Zero(s, **k), "scale": lambda s, **k: Scale(s, 1.7, **k)}
    made["add"] = lambda s, **k: Add(s, torch.tensor(0.5), **k)
    hooks = []
    for what, layer, head, rows, positions in plan:

        def edit(module, args, what=what, head=head, rows=rows, positions=positions):
            z = args[0].clone().unflatten(-1, (4, HEAD))
            new = changes[what](z)
            for row in {r % 3 for r in (rows if rows is not None else range(3))}:
                for column in {c % 10 for c in (positions if positions is not None else range(10))}:
                    z[row, column, head] = new[row, column, head]
            return (z.flatten(-2),)

        hooks.append(llama.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(edit))
    with torch.no_grad():
        twin = llama(**inputs)[0]
    for hook in hooks:
        hook.remove()
    ours = run(llama, inputs, *[made[w](f"L{n}.H{h}", rows=r, positions=p) for w, n, h, r, p in plan])
    close(ours, twin)


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (lambda: Zero("L7.H1"), "has the layers 0 to 1, not 7"),
        (lambda: Zero("L1.H9"), r"heads 0 to 3, not 9. Did you mean L1.H3.z\?"),
        (lambda: Zero("L1.H1", rows=[5]), r"rows \[5\] do not fit a batch of 3"),
        (lambda: Zero("L1.H1", positions=[-11]), "position -11 is before the start of a prompt of 10"),
        (lambda: Patch("L1.H1", torch.zeros(2, 10, HEAD)), "the source has 2 rows, this run has 3"),
        (
            lambda: Patch("L1.H1", torch.zeros(HEAD + 1)),
            r"L1.H1.z: Patch does not fit a value of shape \[3, 10, 1, 8\]",
        ),
        (lambda: Patch("L1.H1", torch.zeros(3, 10, HEAD + 1)), "does not fit a value of shape"),
        (lambda: Add("L1.H1", torch.zeros(HEAD + 1)), "does not fit a value of shape"),
        (lambda: "L1.H1", "'L1.H1' is not an intervention; use Zero, Mean"),
    ],
)
def test_what_does_not_fit_is_said(llama, inputs, one, said):
    with pytest.raises(ValueError, match=said):
        run(llama, inputs, one())


def test_resampling_one_row_is_refused(llama):
    with pytest.raises(ValueError, match="resampling inside a batch of 1 changes nothing"):
        run(llama, FAMILIES["llama"].inputs(rows=1), Resample("L1.H1"))
