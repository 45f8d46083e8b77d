"""How far heads look by position alone, against a twin that turns queries and keys before they are rotated."""

import pytest
import torch
from families import ALL, VOCAB
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from headwise.heads import Reach
from headwise.tap import tap
from headwise.task import Batch


@pytest.fixture(scope="module")
def llama():
    return ALL["llama"].build()


def texts(pads: int = 0) -> Batch:
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if pads:
        ids, mask = (torch.cat([one.new_zeros(2, pads), one], 1) for one in (ids, mask))
    none = torch.zeros(2, 1, dtype=torch.long)
    return Batch({"input_ids": ids, "attention_mask": mask}, at=none, answer=none)


def twin(model, batch: Batch, tokens: int) -> dict[str, float]:
    with torch.no_grad(), tap(model, "q_pre", "k_pre") as t:
        model(**batch.inputs)
    places, found = torch.arange(tokens)[None], {}
    for layer, k in t.by_layer("k_pre").items():
        q = t[f"L{layer}.q_pre"]
        cos, sin = model.model.rotary_emb(q, places)
        same = [one.mean(2, keepdim=True).expand(-1, -1, tokens, -1) for one in (q, k)]
        q, k = apply_rotary_pos_emb(*same, cos, sin)
        groups = q.shape[1] // k.shape[1]
        for head in range(k.shape[1]):
            areas = []
            for mine in range(head * groups, (head + 1) * groups):
                scores = torch.einsum("bd,bkd->bk", q[:, mine, -1], k[:, head]) * k.shape[-1] ** -0.5
                areas += [float(row.softmax(-1).cumsum(0).mean()) for row in scores]
            found[f"L{layer}.G{head}"] = sum(areas) / len(areas)
    return found


def values(model, batch: Batch, **fields) -> dict[str, float]:
    return dict(Reach(**fields).score(model, batch).table.select("unit", "value").iter_rows())


def test_areas_are_those_of_the_twin_and_padding_changes_none(llama):
    want = twin(llama, texts(), 40)
    assert values(llama, texts(), tokens=40) == pytest.approx(want, abs=1e-5)
    assert values(llama, texts(pads=3), tokens=40) == pytest.approx(want, abs=1e-4)


def test_a_head_whose_keys_are_nothing_looks_evenly_and_one_that_looks_at_itself_reaches_nowhere():
    model = ALL["llama"].build()
    attention, size = model.model.layers[1].self_attn, model.config.head_dim
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    with torch.no_grad():
        attention.k_proj.weight[:size] = 0
        attention.k_proj.weight[size : 2 * size] *= 100
        for head in range(groups, 2 * groups):
            attention.q_proj.weight[head * size : (head + 1) * size] = attention.k_proj.weight[size : 2 * size]
    found = values(model, texts(), tokens=101)
    assert found["L1.G0"] == pytest.approx((101 + 1) / 2 / 101)
    assert found["L1.G1"] < 0.05


@pytest.mark.parametrize(
    ("kind", "fields", "says"), [("gpt2", {}, "not rotary"), ("llama", {"tokens": 1}, "2 or more")]
)
def test_refusals(kind, fields, says):
    with pytest.raises(ValueError, match=says):
        Reach(**fields).score(ALL[kind].build(), texts())
