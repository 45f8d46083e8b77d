"""Patched edges equal the literal twin on every family; a run leaves no trace; what cannot be done is refused."""

import dataclasses
import random

import polars as pl
import pytest
import torch
from families import ALL
from literal_paths import literal
from test_heads import make
from traces import traces

from headwise.edges import Edges
from headwise.graph import COLUMNS, Graph
from headwise.paths import prepare
from headwise.task import logit_diff, logprob

KINDS = ("llama", "qwen2", "qwen3", "mistral", "mixtral", "gpt2", "gpt_neox", "phi3", "opt", "gpt_oss")
REFUSED = {
    "gemma2": "not the sum",
    "olmo2": "not the sum",
    "qwen3_5": "not the sum",
    "falcon": "not the sum",
    "gptj": "no norm of its own",
    "deepseek_v3": "told apart by head",
    "bert": "does not predict next",
    "t5": "is an encoder-decoder",
    "vit": "does not predict next",
}


def ready(kind, metric=logit_diff, **more):
    model, batch = ALL[kind].build(), make(kind)
    (paths,) = prepare(model, batch, metric, **more)
    return model, batch, paths


@pytest.mark.parametrize("kind", KINDS)
def test_any_set_of_edges_is_patched_as_by_the_letter(kind):
    model, batch, paths = ready(kind)
    draw, edges = random.Random(kind), paths.edges.all()
    sets = [[edge] for edge in draw.sample(edges, 4)]
    sets += [draw.sample(edges, n) for n in (3, 20, 60)]
    expected = torch.stack([literal(model, batch, one, logit_diff) for one in sets])
    size = float(expected.abs().max())
    alone = torch.stack([paths.run(paths.patching(one)[None])[0] for one in sets])
    assert paths.shared
    assert (alone - expected).abs().max() <= 1e-5 * max(1.0, size)
    assert (paths.single([one[0] for one in sets[:4]]) - alone[:4]).abs().max() <= 1e-5 * max(1.0, size)
    together = torch.stack([paths.patching(one) for one in sets])
    assert (paths.run(together) - expected).abs().max() <= 1e-5 * max(1.0, size)
    paths.shared = False
    assert (paths.run(together) - expected).abs().max() <= 1e-5 * max(1.0, size)
    assert (expected[:4] - paths.clean).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_no_edge_is_the_clean_run_and_every_edge_the_corrupt_one(kind):
    _, _, paths = ready(kind)
    nothing, everything = paths.patching([]), paths.exists.float()
    value = paths.run(torch.stack([nothing, everything, paths.around([])]))
    close = {"rtol": 1e-5, "atol": 1e-5}
    assert torch.allclose(value[0], paths.clean, **close)
    assert torch.allclose(value[1], paths.corrupt, **close) and torch.equal(value[1], value[2])
    assert torch.equal(paths.run(nothing[None])[0], paths.clean)


def test_edges_that_lead_nowhere_change_nothing():
    _, _, paths = ready("llama")
    draw, edges = random.Random(1), paths.edges.all()
    shorter = 0
    for size in (6, 12, 25, 50):
        one = draw.sample(edges, size)
        table = pl.DataFrame([(*edge, 1.0, 0.0, 1) for edge in one], schema=COLUMNS, orient="row")
        graph = Graph("test", table, paths.edges.heads)
        shorter += len(graph.pruned()) < len(graph)
        both = paths.run(torch.stack([paths.around(graph), paths.around(graph.pruned())]))
        assert torch.allclose(both[0], both[1], atol=2e-5)
    assert shorter >= 2


def test_columns_of_the_embedding_add_up_to_it():
    _, batch, paths = ready("llama", tokens=True)
    (plain,) = prepare(ALL["llama"].build(), batch, logit_diff)
    assert paths.sources[:3] == ["embed@0", "embed@1", "embed@2"] and len(paths.sources) == len(plain.sources) + 23
    for target in ("L0.G1.k", "L1.mlp", "logits"):
        each = [(f"embed@{t}", target) for t in range(24)]
        whole = plain.run(plain.patching([("embed", target)])[None])
        assert torch.allclose(paths.run(paths.patching(each)[None]), whole, atol=1e-5)
    first = paths.single([(f"embed@{t}", "logits") for t in (5, 23)])
    assert torch.equal(first[0], paths.clean) and not torch.allclose(first[1], paths.clean)


def test_half_patched_lies_between():
    _, _, paths = ready("gpt2")
    edge = paths.patching([("L1.mlp", "logits")])
    small = (paths.run(0.001 * edge[None]) - paths.clean).abs()
    whole = (paths.run(edge[None]) - paths.clean).abs()
    assert 0 < small.max() < 0.1 * whole.max()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_no_trace_is_left(kind):
    model, batch = ALL[kind].build(), make(kind)
    with torch.no_grad():
        before = model(**batch.inputs).logits
    was = traces(model)
    (paths,) = prepare(model, batch, logprob)
    paths.single(paths.edges.all()[-3:])
    assert traces(model) == was
    with torch.no_grad():
        assert torch.equal(model(**batch.inputs).logits, before)


@pytest.mark.parametrize("kind", REFUSED)
def test_other_models_are_refused(kind):
    with pytest.raises(ValueError, match=REFUSED[kind]):
        Edges(ALL[kind].build())


def test_what_cannot_be_patched_is_a_sentence():
    model, batch, paths = ready("llama")
    for edge in (("L1.H0", "L0.mlp"), ("embed", "L9.mlp"), ("embed@2", "logits"), ("L0.H0", "L0.H0")):
        with pytest.raises(ValueError, match="has no edge from"):
            paths.patching([edge])
    with pytest.raises(ValueError, match="has no corrupt prompts"):
        prepare(model, dataclasses.replace(batch, corrupt=None), logit_diff)
    short = {name: value[:, 1:] for name, value in batch.corrupt.items()}
    with pytest.raises(ValueError, match="same number of tokens"):
        prepare(model, dataclasses.replace(batch, corrupt=short), logit_diff)
