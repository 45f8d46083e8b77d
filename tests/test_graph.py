"""Graphs: which edges can be, thresholds, growing and pruning, algebra, files."""

import random

import numpy as np
import polars as pl
import pytest

from headwise.graph import COLUMNS, Graph, read_at, written_at

HEADS = {0: (4, 2), 1: (4, 2)}


def graph(*edges, heads=HEADS, **more):
    rows = [(*edge, 0.1, 3) if len(edge) == 3 else (*edge, 1.0, 0.1, 3) for edge in edges]
    return Graph("test", pl.DataFrame(rows, schema=COLUMNS, orient="row"), heads, **more)


CIRCUIT = (
    ("embed", "L0.G1.v", 3.0),
    ("embed", "L0.H0.q", 0.1),
    ("L0.H2", "L1.G0.k", -5.0),
    ("L0.mlp", "L1.mlp", 0.5),
    ("L1.H1", "logits", 4.0),
    ("L1.H3", "logits", 0.2),
)


def test_order_of_places():
    sources = ["embed", "embed@3", "L0.H1", "L0.mlp", "L1.H0", "L12.mlp"]
    assert [written_at(source) for source in sources] == [-1, -1, 0, 1, 2, 25]
    assert [read_at(t) for t in ("L0.H1.q", "L0.mlp", "L1.G0.k", "L1.G3.v")] == [0, 1, 2, 2]
    assert read_at("logits") > written_at("L99999.mlp")


@pytest.mark.parametrize(
    ("edge", "words"),
    [
        (("L0.H1", "L0.H2.q"), "L0.H2.q cannot read L0.H1, which writes later"),
        (("L1.mlp", "L1.mlp"), "which writes later"),
        (("logits", "L0.mlp"), "'logits' writes to no edge"),
        (("embed", "L0.H1"), "'L0.H1' reads no edge"),
        (("embed", "L0.H1.k"), "'L0.H1.k' reads no edge"),
        (("embed", "L0.G2.k"), "layer 0 has 4 heads and 2 KV heads"),
        (("embed", "L2.H0.q"), "layer 2 has 0 heads"),
    ],
)
def test_edges_that_cannot_be(edge, words):
    with pytest.raises(ValueError, match=words):
        graph(edge)


def test_bad_tables_are_refused():
    with pytest.raises(ValueError, match="some stand twice"):
        graph(CIRCUIT[0], CIRCUIT[0])
    with pytest.raises(ValueError, match="not a rung of evidence"):
        graph(CIRCUIT[0], evidence="certain")
    with pytest.raises(ValueError, match="A graph has the columns"):
        Graph("test", pl.DataFrame({"a": [1]}), HEADS)


def test_a_parallel_block_reads_only_what_came_before():
    assert len(graph(("L0.H1", "L0.mlp"))) == 1


def test_looking():
    g = graph(*CIRCUIT)
    assert len(g) == 6 and ("embed", "L0.G1.v") in g and ("embed", "logits") not in g
    assert g["L0.H2", "L1.G0.k"] == -5.0
    with pytest.raises(ValueError, match="no edge from embed to logits; it has 6 others"):
        g["embed", "logits"]
    assert g.nodes == ["embed", "L0.H2", "L0.mlp", "L1.H1", "L1.H3", "logits"]
    assert g.nodes_of("L1.G0.k") == ["L1.H0", "L1.H1"] and g.nodes_of("L1.H3.q") == ["L1.H3"]
    assert g.top(2).edges == [("L0.H2", "L1.G0.k"), ("L1.H1", "logits")]
    assert len(g.top(0)) == 0 and len(g.top(99)) == 6
    assert g.above(3.0).edges == [CIRCUIT[i][:2] for i in (0, 2, 4)]
    assert sorted(g.mask()) == ["L0.H2", "L0.mlp", "L1.H1", "L1.H3"]


def test_edges_without_a_weight_are_never_chosen():
    g = graph(("embed", "logits", float("nan")), ("embed", "L0.mlp", 0.0))
    assert g.top(5).edges == g.above(0.0).edges == [("embed", "L0.mlp")]
    assert len(g.grown(5)) == 0


def test_pruning_leaves_paths_from_the_tokens_to_the_logits():
    g = graph(*CIRCUIT)
    # H1 reads the keys of G0, to which H2 writes, which reads the values of G1. Nobody feeds H3 and the MLPs.
    assert g.pruned().edges == [CIRCUIT[i][:2] for i in (0, 2, 4)]
    assert g.pruned().pruned().edges == g.pruned().edges
    assert len(graph(*CIRCUIT[:4]).pruned()) == 0
    tokens = graph(("embed@2", "L0.mlp"), ("L0.mlp", "logits"), ("L0.H0", "logits"))
    assert tokens.pruned().nodes == ["embed@2", "L0.mlp", "logits"]


def test_growing_takes_the_largest_edge_into_what_is_there():
    g = graph(*CIRCUIT)
    assert g.grown(1).edges == [("L1.H1", "logits")]
    assert set(g.grown(3).edges) == {CIRCUIT[i][:2] for i in (0, 2, 4)}
    # Not the largest of all: an edge into the MLP, which leads nowhere, never comes.
    assert ("L0.mlp", "L1.mlp") not in g.grown(99)
    assert len(g.grown(99)) == 4


def test_growing_counts_the_edges_of_a_shared_kv_head_once():
    g = graph(("L1.H0", "logits"), ("L1.H1", "logits"), ("embed", "L1.G0.v", 0.5), ("embed", "L1.H0.q", 0.1))
    assert len(g.grown(3)) == 3 and len(g.grown(4)) == 4


def test_random_graphs_keep_their_laws():
    draw = random.Random(0)
    sources = ["embed", *(f"L{n}.{u}" for n in range(2) for u in ("H0", "H1", "H2", "H3", "mlp"))]
    targets = [f"L{n}.{u}" for n in range(2) for u in ("H0.q", "H3.q", "G0.k", "G1.v", "mlp")] + ["logits"]
    edges = [(s, t) for s in sources for t in targets if written_at(s) < read_at(t)]
    for _ in range(30):
        a, b = (graph(*((*e, draw.gauss(0, 1)) for e in draw.sample(edges, draw.randrange(40)))) for _ in "ab")
        assert set((a | b).edges) == set(a.edges) | set(b.edges)
        assert set((a & b).edges) == set(a.edges) & set(b.edges)
        assert set((a - b).edges) == set(a.edges) - set(b.edges)
        assert set(a.pruned().edges) <= set(a.edges)
        assert all((a | b)[e] == a[e] for e in a.edges)
        assert a.overlap(a)["edges"] == a.overlap(a)["nodes"] == 1.0
        assert a.overlap(b)["edges"] == b.overlap(a)["edges"]
        for n in (0, 1, 7):
            assert len(a.top(n)) == min(n, len(a)) and len(a.grown(n)) <= n
        assert {t for _, t in a.grown(99).edges} <= {t for _, t in a.edges}


def test_overlap():
    one, other = graph(*CIRCUIT[:2]), graph(*CIRCUIT[1:3])
    assert one.overlap(other) == {"edges": 1 / 3, "nodes": 1 / 2, "of_this": 0.5}
    assert graph().overlap(graph())["edges"] == 1.0
    assert np.isnan(graph().overlap(one)["of_this"])


def test_files(tmp_path):
    g = graph(*CIRCUIT, evidence="needed", about={"task": {"seed": 3}})
    path = tmp_path / "deep" / "g.parquet"
    g.save(path)
    again = Graph.load(path)
    assert again.table.equals(g.table) and again.heads == g.heads
    assert again.about == g.about and again.evidence == "needed"
    assert [p.name for p in path.parent.iterdir()] == ["g.parquet"]
    (tmp_path / "bad").write_text("no")
    for wrong in (tmp_path / "bad", tmp_path / "none"):
        with pytest.raises(ValueError, match="is not a headwise graph"):
            Graph.load(wrong)
    g.table.write_parquet(tmp_path / "other")
    with pytest.raises(ValueError, match="is not a headwise graph"):
        Graph.load(tmp_path / "other")
