"""Replications of the attention room: their texts, their small models, and outcomes on made-up numbers."""

import pytest
import torch
from attending import values

from headwise.attention import CCA, FlexPrefill, Landmark, StreamingPrefill
from headwise.mixing import causal, softmax_scores
from headwise.replicate import cca, flex_prefill, landmark, recall


def test_text_asks_back_what_it_said():
    ids = recall.recalling_text(50, 128, torch.Generator().manual_seed(0), needle=(0, 30))
    assert torch.equal(ids, recall.recalling_text(50, 128, torch.Generator().manual_seed(0), needle=(0, 30)))
    asked = recall.is_asked(ids)
    assert 0.2 < asked.float().mean() < 0.5 and asked[:, -1].all()
    for row, where in zip(ids.unflatten(1, (-1, 2)).tolist(), asked.tolist(), strict=True):
        known: dict[int, int] = {}
        for (key, value), ask in zip(row, where, strict=True):
            assert ask == (key in known) and (not ask or known[key] == value)
            if key < recall.KEYS:
                known[key] = value
        assert sum(key == row[-1][0] for key, _ in row) == 2
        assert [key for key, _ in row].index(row[-1][0]) < 30


def test_small_models_are_given_the_token_before():
    model = recall.small_model()
    ids = recall.recalling_text(2, 16, torch.Generator().manual_seed(0))
    own = model.get_input_embeddings()(ids)
    more = recall.given(model, ids) - own
    torch.testing.assert_close(more[:, 1:].norm(dim=-1), own[:, :-1].norm(dim=-1))
    assert more[:, 0].abs().max() == 0


@pytest.mark.parametrize(("method", "block"), [(Landmark(block=8), 8), (CCA(4, 8), None), (None, None)])
def test_small_models_learn_with_a_method(method, block):
    models = [recall.trained(0, method, block, steps=4, length=32) for _ in range(2)]
    ids = recall.recalling_text(4, 32, torch.Generator().manual_seed(1))
    one, other = (recall.answers(model, ids, method, block) for model in models)
    assert torch.equal(one, other) and one.shape == (4, 16, recall.LANDMARK + 1)
    changed = (
        recall.nats(one, ids) - recall.nats(recall.answers(recall.small_model(0), ids, method, block), ids)
    ).abs()
    assert changed > 1e-4


def test_the_latest_blocks_see_no_others():
    model = recall.small_model()
    ids = recall.recalling_text(2, 128, torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, :8] = recall.LANDMARK - 1
    one, _ = landmark.latest_only(model, ids, 2)
    two, asked = landmark.latest_only(model, other, 2)
    assert one.shape[:2] == asked.shape == (2, 56)
    torch.testing.assert_close(one[:, 4:], two[:, 4:])
    assert (one[:, :4] - two[:, :4]).abs().max() > 1e-4


def test_windows_of_a_share():
    for share in (0.1, 0.4, 0.9):
        window = flex_prefill.window_of_share(share, 300, 16)
        at = torch.arange(300)
        seen = [float(StreamingPrefill(16, w)._seen(at, at).sum()) / (300 * 301 / 2) for w in (window, window + 1)]
        assert share <= seen[0] < seen[1]
        if window > 1:
            less = float(StreamingPrefill(16, window - 1)._seen(at, at).sum()) / (300 * 301 / 2)
            assert less < share


def test_coverage_is_true_attention_inside_the_blocks():
    q, k, _ = values(64, 64, rows=1)
    method = FlexPrefill(gamma=0.6, block=8, budget=8)
    found = flex_prefill.covered(method, q, k, 0.35)
    keep = method.kept(q, k, 0.35).repeat_interleave(8, 2).repeat_interleave(8, 3)
    mass = (softmax_scores(q, k, 0.35, causal(64, 64)) * keep).sum(-1)
    torch.testing.assert_close(found, mass[0].unflatten(-1, (8, 8)).mean(-1))


def test_outcomes_on_made_up_numbers():
    row = {"covered": 0.99, "query_aware": 0.0, "window": 9, "right": {"full": True, "flex": True, "fixed": False}}
    for flex, share, outcome in ((0.01, 0.4, "holds"), (0.01, 0.6, "partly"), (0.3, 0.4, "fails")):
        one = row | {"change": {"flex": flex, "fixed": 0.2}, "computed": share, "cases": 0.97}
        assert flex_prefill.FlexPrefill()._judge([one], 2048).outcome == outcome
    for nats, needles, outcome in ((0.05, 90, "holds"), (0.2, 90, "partly"), (0.6, 90, "fails"), (0.05, 50, "partly")):
        found = {"full": {"nats": 0.01, "needles": 100.0}, "window": {"nats": 0.5, "needles": 5.0}}
        found["cca"] = {"nats": nats, "needles": needles}
        assert cca.CCA()._judge(found, 9, 9).outcome == outcome
    for looked_up, latest, near, outcome in (
        (0.1, 1.0, 90, "holds"), (0.1, 1.0, 50, "partly"), (0.1, 0.12, 90, "partly"), (0.4, 1.0, 90, "fails"),
    ):  # fmt: skip
        found = {"all": 0.09, "looked up": looked_up, "latest": latest, "plain": 0.01}
        needles = {"near": near, "as they stand": 40.0, "cut": 3.0}
        assert landmark.Landmark()._judge(found, needles, 64).outcome == outcome
