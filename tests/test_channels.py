"""Channels between heads, and heads that two tasks share."""

import dataclasses

import numpy as np
import pytest
import torch
from families import ALL
from test_heads import make
from traces import traces

from headwise.circuits import ComponentReuse, TalkingHeads
from headwise.circuits.talking_heads import ScaleChannel, channels, in_z
from headwise.data import IOI, Planted
from headwise.do import Scale, do
from headwise.heads import Attribution
from headwise.replicate.component_reuse import ComponentReuse as Reused
from headwise.replicate.talking_heads import TalkingHeads as Talked
from headwise.score import Score
from headwise.tap import tap
from headwise.task import answer_logits, logprob
from headwise.weights import Weights


@pytest.fixture(scope="module")
def planted():
    return Planted().build(5)


# Every field of the stream that one planted head writes and another reads (data.wiring); no other two share a field.
WIRED = {
    ("previous token", "induction", "k"), ("previous token", "mute", "k"), ("previous token", "retrieval", "k"),
    ("duplicate token", "subject inhibition", "k"), ("duplicate token", "subject inhibition", "v"),
    ("duplicate token", "name mover", "q"), ("subject inhibition", "name mover", "q"),
}  # fmt: skip


@pytest.mark.parametrize("seed", [5, 6, 7])
def test_planted_heads_talk_to_those_they_were_made_for_and_to_no_others(seed):
    made = Planted().build(seed)
    graph, roles = TalkingHeads().find(made.model), made.truth | made.decoys
    role = dict.fromkeys((f"L{n}.H{i}" for n, (heads, _) in graph.heads.items() for i in range(heads)), "") | roles
    wired = {edge for edge in graph.edges if (role[edge[0]], role[graph.nodes_of(edge[1])[0]], edge[1][-1]) in WIRED}
    assert len(wired) == len(WIRED)
    assert all(graph[edge] > 0.02 for edge in wired)
    assert max(graph[edge] for edge in set(graph.edges) - wired) < 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_all_channels_are_the_head_and_none_is_nothing(kind):
    model, batch = ALL[kind].build(), make(kind)
    weights = Weights(model)
    all_of_it = list(range(len(channels(weights, 1, 2))))
    was = traces(model)
    with torch.no_grad():
        runs = []
        for one in (
            Scale("L1.H2", 3.0),
            ScaleChannel("L1.H2", 3.0, in_z(weights, "L1.H2", all_of_it)),
            ScaleChannel("L1.H2", 3.0, in_z(weights, "L1.H2", [0])),
            ScaleChannel("L1.H2", 1.0, in_z(weights, "L1.H2", [0])),
        ):
            with do(model, one):
                runs.append(answer_logits(model, batch))
        plain = answer_logits(model, batch)
    assert torch.allclose(runs[0], runs[1], atol=1e-3) and torch.allclose(runs[3], plain, atol=1e-6)
    assert not torch.allclose(runs[2], runs[0], atol=1e-3) and not torch.allclose(runs[2], plain, atol=1e-3)
    assert traces(model) == was


def test_scaling_a_channel_changes_the_stream_along_it_only():
    model, batch = ALL["llama"].build(), make("llama")
    weights = Weights(model)
    direction = channels(weights, 0, 1)[2]
    with torch.no_grad(), tap(model, "L0.attn") as plain:
        model(**batch.inputs)
    with (
        torch.no_grad(),
        do(model, ScaleChannel("L0.H1", 0.0, in_z(weights, "L0.H1", [2]))),
        tap(model, "L0.attn") as t,
    ):
        model(**batch.inputs)
    moved = t["L0.attn"] - plain["L0.attn"]
    along = (moved @ direction)[..., None] * direction
    assert moved.abs().max() > 1e-3 and torch.allclose(moved, along, atol=1e-4)


def test_the_best_channel_of_an_edge_is_its_weight(planted):
    graph, method = TalkingHeads().find(planted.model), TalkingHeads()
    at = {role: unit for unit, role in planted.truth.items()}
    writer, reader = at["subject inhibition"], at["name mover"]
    number, weight = method.channel(planted.model, writer, f"{reader}.q")
    assert 0 <= number < 8 and weight == pytest.approx(graph[writer, f"{reader}.q"], abs=1e-6)
    with pytest.raises(ValueError, match="rank = 0 looks at no direction"):
        TalkingHeads(rank=0).find(planted.model)


def score(values: list[float]) -> Score:
    model = ALL["llama"].build()
    table = {n: torch.tensor(values[4 * n : 4 * n + 4]) for n in (0, 1)}
    return Score.of_heads(Attribution(), model, None, table, name="made")


def test_equal_tasks_share_their_heads_and_turned_ones_share_none():
    up = [float(i) for i in range(8)]
    reuse = ComponentReuse(share=0.25)
    same, turned = (reuse.compare(score(up), score(values)) for values in (up, up[::-1]))
    assert same.shared == 1 and same.rank == pytest.approx(1) and same.p < 0.01 and same.first == {"L1.H2", "L1.H3"}
    assert turned.shared == 0 and turned.rank == pytest.approx(-1) and turned.p > 0.9
    assert same.chance == pytest.approx(0.25)
    fewer = dataclasses.replace(score(up), table=score(up).table[:4])
    with pytest.raises(ValueError, match="score different heads"):
        reuse.compare(score(up), fewer)


def test_a_head_that_was_weakened_is_set_again(planted):
    model, batch = planted.model, IOI().make(planted.tokenizer, 4, 3)
    at = {role: unit for unit, role in planted.truth.items()}
    mover = at["name mover"]
    layer, index = (int(x[1:]) for x in mover.split("."))
    out = model.model.layers[layer].self_attn.o_proj.weight
    columns = slice(index * 64, index * 64 + 64)
    kept = out[:, columns].clone()
    try:
        out[:, columns] *= 0.05
        method = ComponentReuse(strengths=(0.0, 20.0))
        found = method.repair(model, batch, [mover, at["duplicate token"], at["previous token"]])
        assert found[mover] == 20.0 and len(found) <= 2
        with torch.no_grad():
            before = logprob(answer_logits(model, batch), batch).mean()
            with do(model, *[Scale(head, alpha) for head, alpha in found.items()]):
                after = logprob(answer_logits(model, batch), batch).mean()
        assert after > before + 0.1 and np.isfinite(float(after))
    finally:
        out[:, columns] = kept


def test_outcomes_on_made_up_numbers():
    up = [float(i) for i in range(8)]
    reuse = ComponentReuse(share=0.25).compare(score(up), score(up))

    def repaired(rates):
        return Reused()._judge(reuse, {"L1.H2": 3.0}, {}, rates, 48).outcome

    assert repaired([40, 60, 45]) == "holds" and repaired([40, 50, 45]) == repaired([40, 60, 65]) == "partly"

    def edited(rates, places, lost):
        return Talked()._judge(("L1.H2", 0, 4.0), rates, ("L0.H1", "L1.H2"), places, lost, 64).outcome

    assert edited([30, 50, 31, 29, 30], [0.001, 0.3], [0.7, 0.02, 0.03, 0.01]) == "holds"
    assert edited([30, 50, 31, 29, 30], [0.2, 0.3], [0.7, 0.02, 0.03, 0.01]) == "partly"
    assert edited([30, 35, 31, 29, 30], [0.001, 0.3], [0.7, 0.02, 0.03, 0.01]) == "fails"
