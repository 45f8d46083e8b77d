"""Codes of head outputs: by hand, and on planted models."""

import numpy as np
import pytest
import torch
from families import ALL
from test_heads import make

from headwise.data import IOI, Planted
from headwise.heads import DiscreteSAE
from headwise.heads.discrete_sae import unshared
from headwise.replicate.discrete_sae import DiscreteSAECircuits, swapped
from headwise.stats import auc


def test_codes_that_the_other_kind_has_count_for_nothing():
    clean = torch.tensor([[1, 5, 7], [2, 5, 8]])
    corrupt = torch.tensor([[3, 5, 7], [4, 5, 9]])
    assert unshared(torch.stack([clean, corrupt])).tolist() == [[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]]


def test_heads_of_the_planted_circuit_have_codes_of_their_own():
    planted = Planted().build(5)
    batch = IOI().make(planted.tokenizer, 8, 0)
    score = DiscreteSAE().score(planted.model, batch)
    at = {role: unit for unit, role in planted.truth.items()}
    # In the answer's column, corrupt prompts change what is ignored, and what is therefore said.
    assert score[at["subject inhibition"]] >= 0.9
    others = [u for u in score.table["unit"] if u not in planted.truth]
    assert np.mean([score[u] for u in others]) < 0.2


def test_a_dictionary_of_nothing_is_a_sentence():
    for name in ("features", "steps"):
        with pytest.raises(ValueError, match=f"{name} = 0 trains nothing"):
            DiscreteSAE(**{name: 0}).score(ALL["llama"].build(), make("llama"))


def test_the_area_and_the_control():
    assert auc(np.array([3.0, 2.0, 1.0, 0.0]), np.array([1, 1, 0, 0])) == 1.0
    assert auc(np.zeros(4), np.array([1, 1, 0, 0])) == 0.5
    assert np.isnan(auc(np.zeros(4), np.zeros(4)))
    batch = make("llama")
    other = swapped(batch)
    assert torch.equal(other.ids[0], batch.ids[0]) and torch.equal(other.ids[1], batch.corrupt["input_ids"][1])
    assert torch.equal(other.corrupt["input_ids"][1], batch.ids[1])


def test_outcomes_on_made_up_numbers():
    def judged(found, rival, seconds):
        return DiscreteSAECircuits()._judge([found] * 3, [0.5] * 3, rival, seconds, 500.0, 270).outcome

    assert judged(0.9, 0.8, 5) == "holds"
    assert judged(0.9, 0.95, 5) == judged(0.9, 0.8, 20) == "partly"
    assert judged(0.7, 0.6, 5) == "fails"
