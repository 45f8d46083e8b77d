"""Every intervention equals a naive twin: own hooks, edited weights, a mask written by hand."""

import copy

import pytest
import torch
from doing import HEAD, close, run, values
from families import ALL, FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headwise.anatomy import anatomy
from headwise.do import Add, Mean, Patch, Project, Resample, Scale, Zero, do
from headwise.tap import tap

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


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
