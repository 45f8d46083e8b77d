"""What a graph is worth: a planted circuit explains, a part of it or a random one does not."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import ALL
from test_circuits import chains
from test_heads import make

from headwise.circuits import EapIg, EdgePruning, PathPatching
from headwise.data import Planted
from headwise.paths import prepare
from headwise.task import logit_diff
from headwise.worth import Appraisal, Worth, gap, outcomes, random_paths, share, shuffled, smallest


@pytest.fixture(scope="module")
def planted():
    made = Planted().build(5)
    task, must, _ = chains(made.truth)[0]
    return made, task, must


@pytest.fixture(scope="module")
def ready():
    model, batch = ALL["llama"].build(), make("llama")
    (paths,) = prepare(model, batch, logit_diff)
    return model, batch, paths, PathPatching().find(model, batch)


def test_a_planted_circuit_explains_and_is_found(planted):
    made, task, must = planted
    found = EdgePruning(target=0.9).find(made.model, task.make(made.tokenizer, 2, 0))
    assert set(found.edges) == must and found.about["reached"] > 0.99
    worth = Appraisal(draws=20).measure(made.model, task.make(made.tokenizer, 3, 1), found)
    assert worth.explains and worth.reasons == [] and "explain the behaviour" in worth.sentence()
    assert worth.faithfulness == pytest.approx(1, abs=1e-3) and worth.left == pytest.approx(0, abs=1e-3)
    assert worth.low <= worth.faithfulness <= worth.high
    assert set(worth.losses) == {"embed"} | {s for s, _ in must if s != "embed"}
    assert min(worth.losses.values()) > 0.9 and worth.idle == 0
    assert worth.incompleteness < 0.01
    assert max(worth.p.values()) == pytest.approx(1 / 21)


def test_half_a_circuit_does_not_explain(planted):
    made, task, must = planted
    batch = task.make(made.tokenizer, 2, 1)
    graph = EapIg().find(made.model, batch)
    worth = Appraisal(draws=20, halves=0).measure(made.model, batch, graph.only(sorted(must)[:2]))
    assert not worth.explains and abs(worth.faithfulness) < 0.01
    assert "do not explain the behaviour: alone it does" in worth.sentence()
    assert len(worth.reasons) == 3 and "as well (p = 1)" in worth.sentence()


def test_the_whole_model_explains_itself_and_nothing_explains_nothing(ready):
    _, batch, paths, graph = ready
    clean, corrupt = paths.clean.numpy(), paths.corrupt.numpy()
    if clean.mean() < corrupt.mean():
        clean, corrupt = corrupt, clean
    values = outcomes([paths], [graph, []])
    assert np.allclose(values, [paths.clean, paths.corrupt], atol=1e-5)
    assert share(np.stack([clean, corrupt]), clean, corrupt).tolist() == pytest.approx([1, 0])


def test_side_by_side_or_one_after_the_other(ready):
    *_, paths, graph = ready
    draw = random.Random(3)
    circuits = [random_paths(paths, graph.top(n), draw) for n in (5, 20, 40)]
    assert np.allclose(outcomes([paths], circuits, 1), outcomes([paths], circuits, 3), atol=1e-5)


def test_random_circuits_have_the_same_size(ready):
    *_, paths, graph = ready
    draw = random.Random(0)
    for n in (1, 7, 30, 60):
        one = graph.top(n)
        paths_drawn, other = random_paths(paths, one, draw), shuffled(paths, one, draw)
        for edges in (paths_drawn, other):
            assert len(set(edges)) == n
            assert paths.exists[paths.patching(edges) > 0].all()
        assert sorted(t.split(".")[0] for _, t in other) == sorted(t.split(".")[0] for _, t in one.edges)
    several = random_paths(paths, graph.top(30), draw)
    table = graph.only(several)
    assert len(table.pruned()) >= 20


def test_a_shuffled_graph_is_the_same_graph_elsewhere(ready):
    *_, paths, graph = ready
    one = graph.grown(25).pruned()
    other = graph.only(shuffled(paths, one, random.Random(1)))
    assert len(other) == len(one) == len(other.pruned())


def test_the_smallest_circuit_reaches_its_target(ready):
    model, batch, paths, graph = ready
    sign = 1 if paths.clean.mean() > paths.corrupt.mean() else -1
    (part,) = prepare(model, batch, lambda logits, rows: sign * logit_diff(logits, rows))
    for target in (0.5, 0.9):
        found, reached = smallest([part], graph, target, spare=10)
        clean, corrupt = gap([part])
        again = share(outcomes([part], [found]), clean, corrupt)[0]
        assert reached == pytest.approx(again, abs=1e-5) and abs(1 - reached) <= 1 - target + 1e-6
        assert found.edges == found.pruned().edges


def test_what_cannot_be_measured_is_a_sentence(ready, planted):
    model, batch, paths, graph = ready
    with pytest.raises(ValueError, match="without edges has no worth"):
        Appraisal().measure(model, batch, graph.top(0))
    backwards = dict(zip(("inputs", "corrupt"), (batch.corrupt, batch.inputs), strict=True))
    turned = batch if paths.clean.mean() < paths.corrupt.mean() else replace(batch, **backwards)
    with pytest.raises(ValueError, match="nothing that a circuit could explain"):
        Appraisal().measure(model, turned, graph.top(9))
    for wrong, words in (
        ({"target": 1.5}, "not 1.5"),
        ({"rank": "circuits.edge_pruning"}, "does not rank edges"),
        ({"rank": "heads.induction"}, "does not rank edges"),
    ):
        with pytest.raises(ValueError, match=words):
            EdgePruning(**wrong).find(model, batch)


def test_one_prompt_has_no_interval(planted):
    made, task, must = planted
    batch = task.make(made.tokenizer, 1, 4)
    graph = PathPatching(receivers=tuple(sorted({t for _, t in must}))).find(made.model, batch).above(1.0)
    worth = Appraisal(draws=0, nodes=0).measure(made.model, batch, graph)
    assert isinstance(worth, Worth) and np.isnan(worth.low) and np.isnan(worth.idle)
    assert worth.nulls == {} and worth.explains
    assert torch.isfinite(torch.tensor(worth.incompleteness))
