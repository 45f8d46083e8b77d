"""What methods of the features room must give exactly, against gradients, weights and the model itself."""

import pytest
import torch
from families import ALL, VOCAB
from test_features import KINDS, make

from headwise.direct import direct_attribution, into_residual
from headwise.do import Patch, Zero, do
from headwise.features import LIB, ConceptDepth, LmHeadNeurons, ObsProp
from headwise.features.concept_depth import depths
from headwise.features.lib import interactions
from headwise.features.lm_head_neurons import strongest
from headwise.features.obs_prop import amounts, coupling, first_column
from headwise.reader import Map, states
from headwise.tap import tap
from headwise.task import Batch, answer_logits
from headwise.weights import Weights


@pytest.fixture(scope="module")
def models():
    return {kind: ALL[kind].build() for kind in KINDS}


# ObsProp


def test_an_observable_carried_through_a_frozen_path_is_its_gradient():
    """Against autograd on the model itself, all norms held at their scale, patterns kept, all other paths cut."""
    model = ALL["llama"].build()
    model.requires_grad_(False)
    batch = make("llama", 1)
    one = Batch(batch.inputs, at=torch.tensor([[8]]), answer=torch.tensor([[5]]), foil=torch.tensor([[6]]))
    weights = Weights(model)
    with torch.no_grad(), tap(model, "pattern", "resid_pre", "resid_post") as t:
        model(**one.inputs)
    pattern = {n: t[f"L{n}.pattern"] for n in (0, 1)}
    scale = {n: weights.pre_norm(n).scale(t[f"L{n}.resid_pre"]).detach() for n in (0, 1)}
    last = weights.final.scale(t["L1.resid_post"]).detach()[0, 8]
    reader = ObsProp(chains=8).fit(model, [one])
    made = reader.found["scales"]

    def held(norm, size):
        return norm.module.register_forward_hook(lambda _m, args, _out: args[0] / size * norm.gain)

    hooks = [held(weights.pre_norm(0), scale[0]), held(weights.pre_norm(1), scale[1])]
    hooks.append(held(weights.final, last))
    x0 = t["L0.resid_pre"].clone().requires_grad_()
    try:
        with torch.enable_grad():
            cut = [Zero("L0.mlp"), Zero("L1.mlp"), *(Zero(f"L0.H{i}") for i in range(4) if i != 1)]
            cut += [Zero(f"L1.H{i}") for i in range(4) if i != 2]
            keep = [Patch(f"L{n}.pattern", pattern[n]) for n in (0, 1)]
            with do(model, Patch("L0.resid_pre", x0), *keep, *cut), tap(model, "L0.H1.z", "L1.H2.z", grad=False):
                whole = _difference(model, one)
            (both,) = torch.autograd.grad(whole, x0)
            with do(model, Patch("L0.resid_pre", x0), *keep, *cut[:2], *(Zero(f"L0.H{i}") for i in range(4)), *cut[5:]):
                (late,) = torch.autograd.grad(_difference(model, one), x0)
            with do(model, Patch("L0.resid_pre", x0), *keep, *cut[:5], *(Zero(f"L1.H{i}") for i in range(4))):
                (early,) = torch.autograd.grad(_difference(model, one), x0)
            with do(model, Patch("L0.resid_pre", x0), *keep, *cut[:2], Zero("L0.z"), Zero("L1.z")):
                (direct,) = torch.autograd.grad(_difference(model, one), x0)
    finally:
        for hook in hooks:
            hook.remove()
    single = early - direct
    for column in (0, 3, 8):
        mine = reader["L0.H1"].weight[:, 0] * pattern[0][0, 1, 8, column]
        mine = mine * made["L0"] / scale[0][0, column] * made["final"] / last
        assert torch.allclose(single[0, column], mine, rtol=1e-3, atol=1e-5)
    chain = both - early - late + direct
    for column in (0, 3, 8):
        seen = sum(
            pattern[1][0, 2, 8, middle] / scale[1][0, middle] * pattern[0][0, 1, middle, column] for middle in range(9)
        )
        mine = reader["L0.H1>L1.H2"].weight[:, 0] * seen / scale[0][0, column]
        mine = mine * made["L0"] * made["L1"] * made["final"] / last
        assert torch.allclose(chain[0, column], mine, rtol=1e-3, atol=1e-5)


def _difference(model, batch: Batch) -> torch.Tensor:
    logits = model(**batch.inputs).logits[0, 8]
    return logits[5] - logits[6]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen3_5"])
def test_what_a_head_adds_is_its_pattern_times_the_reading(kind, models):
    """One prompt of one column: every mean scale is the scale, so that the reading is exact."""
    model = models[kind]
    ids = torch.tensor([[7]])
    zero = torch.zeros(1, 1, dtype=torch.long)
    one = Batch({"input_ids": ids}, at=zero, answer=zero + 5, foil=zero + 6)
    weights = Weights(model)
    reader = ObsProp(chains=0).fit(model, [one])
    read = reader.read(model, one)
    toward = (weights.readout[5] - weights.readout[6])[None, None]
    exact = direct_attribution(weights, one, toward)
    gate = into_residual(weights, one.at)
    with torch.no_grad(), tap(model, "z") as t, gate as given:
        model(**one.inputs)
    for layer, values in exact.items():
        if not torch.allclose(given[layer][:, 0], t[f"L{layer}.z"][:, 0].float(), atol=1e-6):
            continue  # A gate behind the head is no part of the path.
        mine = torch.stack([read[f"L{layer}.H{i}"][0, 0, 0] for i in range(weights.heads(layer))])
        assert torch.allclose(mine, values[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_the_first_column_is_read_under_its_own_scale(kind, models):
    """One prompt of two columns: each has a scale of its own, so that pattern times amounts is exact."""
    model = models[kind]
    end = torch.ones(1, 1, dtype=torch.long)
    one = Batch({"input_ids": torch.tensor([[7, 9]])}, at=end, answer=end + 4, foil=end + 5)
    weights, first = Weights(model), first_column(one)
    reader = ObsProp(chains=0).fit(model, [one])
    toward = (weights.readout[5] - weights.readout[6])[None, None]
    with torch.no_grad(), tap(model, "pattern", "resid_pre") as t:
        model(**one.inputs)
    assert first.tolist() == [[True, False]]
    for layer, values in direct_attribution(weights, one, toward).items():
        pattern, stream = t[f"L{layer}.pattern"][0, :, 1], t[f"L{layer}.resid_pre"]
        mine = [(pattern[i] * amounts(reader, f"L{layer}.H{i}", stream, first)[0]).sum() for i in range(len(pattern))]
        assert torch.allclose(torch.stack(mine), values[0], rtol=1e-3, atol=1e-4)


def test_coupling_is_that_of_even_activations(models):
    reader = ObsProp(plus=(5,), minus=(6,), chains=0).fit(models["llama"], [make("llama")])
    table = coupling(reader, ["L1.H0", "L1.H1"])
    y, other = (reader[name].weight[:, 0] for name in ("L1.H0", "L1.H1"))
    x = torch.randn(20000, 32, generator=torch.Generator().manual_seed(0))
    slope = ((x @ y) * (x @ other)).mean() / (x @ y).square().mean()
    assert table[0, 0] == pytest.approx(1) and float(slope) == pytest.approx(float(table[0, 1]), abs=0.03)
    with pytest.raises(ValueError, match="An observable needs token ids"):
        ObsProp().fit(models["llama"], [make("llama")])


# The local interaction basis


def test_a_basis_has_the_length_of_its_jacobian(models):
    model, batch = models["llama"], make("llama", 24)
    reader = LIB(probes=40, rows=24).fit(model, [batch])
    own = states(model, [batch], ["L0.resid_post"])["L0.resid_post"]
    turned = reader["L0.resid_post"](own)
    back = turned @ reader.tables["L0.resid_post/back"] + own.mean(0)
    assert torch.allclose(back, own, atol=2e-2)
    lengths = torch.tensor(reader.found["lengths"]["L0.resid_post"])
    assert torch.allclose(turned.square().mean(0), lengths.square(), rtol=1e-2, atol=1e-4)
    assert (lengths.diff() <= 1e-6).all()
    plain = reader["L0.resid_post pca"](own)
    spread = plain.T @ plain / len(plain)
    assert torch.allclose(spread, torch.diag(spread.diagonal()), atol=1e-3)


def test_the_basis_does_not_hang_on_how_the_residual_stream_is_turned():
    """Random axes for the residual stream leave lengths and interactions as they are."""
    model, made = ALL["llama"].build(), make("llama", 48)
    batch = Batch(made.inputs, at=made.at[:, -1:].clone(), answer=made.answer[:, -1:])
    sites = ("L0.resid_mid", "L0.resid_post")
    reader = LIB(places=sites, probes=VOCAB, rows=16).fit(model, [batch])
    turned = ALL["llama"].build()
    q = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1))).Q
    with torch.no_grad():
        body = turned.model
        for norm in (body.norm, *(n for b in body.layers for n in (b.input_layernorm, b.post_attention_layernorm))):
            assert torch.all(norm.weight == 1)
        turned.lm_head.weight = torch.nn.Parameter(turned.lm_head.weight.detach().clone() @ q)
        body.embed_tokens.weight = torch.nn.Parameter(body.embed_tokens.weight.detach() @ q)
        for block in body.layers:
            for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                part.weight.copy_(part.weight @ q)
            for part in (block.mlp.gate_proj, block.mlp.up_proj):
                part.weight.copy_(part.weight @ q)
            for part in (block.self_attn.o_proj, block.mlp.down_proj):
                part.weight.copy_(q.T @ part.weight)
    again = LIB(places=sites, probes=VOCAB, rows=16).fit(turned, [batch])
    with torch.no_grad():
        assert torch.allclose(model(**batch.inputs).logits, turned(**batch.inputs).logits, atol=1e-3)
    for place in sites:
        one, two = (torch.tensor(r.found["lengths"][place]) for r in (reader, again))
        assert len(one) == len(two) and torch.allclose(one, two, rtol=0.01, atol=1e-3 * float(one.max()))
    tables = [interactions(m, r, batch, *sites, steps=2) for m, r in ((model, reader), (turned, again))]
    assert torch.allclose(tables[0][:4, :4], tables[1][:4, :4], rtol=0.1, atol=0.02 * float(tables[0].max()))


def test_interactions_of_a_linear_way_are_its_matrix(models):
    """Where the MLP between two places is silent, the way from one to the other is the basis change alone."""
    model, batch = models["llama"], make("llama", 12)
    reader = LIB(places=("L1.resid_mid", "L1.resid_post"), probes=4).fit(model, [batch])
    with do(model, Zero("L1.mlp")):
        table = interactions(model, reader, batch, "L1.resid_mid pca", "L1.resid_post pca", steps=2)
    first, then = reader["L1.resid_mid pca"], reader["L1.resid_post pca"]
    own = first(states(model, [batch], ["L1.resid_mid"])["L1.resid_mid"])
    wanted = (reader.tables["L1.resid_mid pca/back"] @ then.weight).T.abs() * own.square().mean(0).sqrt()
    assert torch.allclose(table, wanted, rtol=1e-3, atol=1e-4)


# Neurons


def test_a_neuron_writes_what_its_reader_says(models):
    """Clamping a neuron of the last layer moves the logits by its column, as the last norm scales it."""
    for kind in ("llama", "gpt2"):
        model, batch = models[kind], make(kind)
        reader = LmHeadNeurons(top=VOCAB).fit(model, [])
        unit = "L1.N3"
        with torch.no_grad(), do(model, Patch(unit, torch.tensor(0.0))), tap(model, "L1.resid_post") as t:
            without = answer_logits(model, batch)
        start = t["L1.resid_post"]
        weights = Weights(model)
        with torch.no_grad(), do(model, Patch(unit, torch.tensor(2.0))), tap(model, "L1.resid_post") as t:
            clamped = answer_logits(model, batch)
        rows = torch.arange(len(batch))[:, None]
        scales = [weights.final.scale(x[rows, batch.at]) for x in (start, t["L1.resid_post"])]
        constant = 0 if kind == "llama" else weights.unembed @ weights.final.shift
        moved = (clamped - constant) * scales[1] - (without - constant) * scales[0]
        written = torch.zeros(VOCAB)
        written[reader.tables["L1/tokens"][3].long()] = reader.tables["L1/values"][3]
        assert torch.allclose(moved[2, 1], 2 * written, rtol=1e-2, atol=1e-2 * float(written.abs().max()))


def test_the_strongest_neuron_of_a_token(models):
    reader = LmHeadNeurons(top=2).fit(models["llama"], [])
    tokens, z = reader.tables["L0/tokens"], reader.tables["L0/z"]
    assert tokens.shape == (48, 2) and (reader.tables["L0/values"].diff(dim=1) <= 0).all()
    best = int(torch.cat([z, reader.tables["L1/z"]]).argmax())
    token = int(torch.cat([tokens, reader.tables["L1/tokens"]])[best, 0])
    assert strongest(reader, token) == [f"L{best // 48}.N{best % 48}"]
    with pytest.raises(ValueError, match="sides down, up, gate, not 'left'"):
        LmHeadNeurons(side="left").fit(models["llama"], [])
    gate, up = (LmHeadNeurons(side=side, top=1).fit(models["llama"], []) for side in ("gate", "up"))
    own = models["llama"].model.layers[0].mlp
    for held, module in ((gate, own.gate_proj), (up, own.up_proj)):
        wanted = (module.weight.detach() @ Weights(models["llama"]).readout.T).amax(-1)
        assert torch.allclose(held.tables["L0/values"][:, 0], wanted, rtol=1e-4)
    assert LmHeadNeurons(side="up").fit(models["gpt2"], []).tables
    with pytest.raises(ValueError, match="no gate projection of its own; it has down, up"):
        LmHeadNeurons(side="gate").fit(models["gpt2"], [])


# Concept depth


def test_a_probe_finds_the_last_token_and_not_what_is_shuffled(models):
    reader = ConceptDepth(share=0.5).fit(models["llama"], [make("llama", 80)])
    found = reader.found["test"]
    assert found["accuracy"][0] == 1.0 and found["converges"] == 0.0 and found["jumps"] is None
    assert max(found["control"]) < 0.75 and found["classes"] == [5, 6]
    assert reader.tables["test/right"].shape == (2, 40)
    with pytest.raises(ValueError, match="'test' has 2 class on these prompts, or stands twice"):
        ConceptDepth().fit(models["llama"], [make("llama"), make("llama")])


def test_depths_of_a_curve():
    assert depths(torch.tensor([0.5, 0.5, 0.6, 0.9, 0.88])) == {"jumps": 0.5, "converges": 0.75}
    assert depths(torch.tensor([0.5, 0.9, 0.8]))["converges"] == 0.5
    assert depths(torch.tensor([0.9, 0.9])) == {"jumps": None, "converges": 0.0}


def test_maps_are_affine():
    one = Map("L0.resid_post", torch.eye(2), torch.ones(2))
    assert one(torch.tensor([1.0, 2.0])).tolist() == [2.0, 3.0]
