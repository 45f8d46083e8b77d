"""Activation patching column by column against one plain run each, and both ways to weigh heads on planted ones."""

from dataclasses import replace

import pytest
import torch
from families import ALL
from test_heads import make

from headwise.data import IOI, Planted
from headwise.do import Patch, do
from headwise.heads import ActivationPatching, DirectAttribution, Restore
from headwise.tap import tap
from headwise.task import answer_logits, logprob


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_5"])
@pytest.mark.parametrize("site", ["z", "resid_pre", "attn", "mlp"])
def test_each_column_is_one_plain_run(kind, site):
    model, batch = ALL[kind].build(), make(kind)
    names, values = ActivationPatching(site=site, rows=5, prompts=3).grid(model, batch)
    assert values.shape == (len(names), 24, 4)
    corrupt, name = batch.flipped(), names[-1]
    place = f"{name}.z" if site == "z" else f"{name}.{site}"
    with torch.no_grad():
        with tap(model, place) as clean:
            model.base_model(**batch.inputs)
        base = logprob(answer_logits(model, corrupt), corrupt)
        for column in (3, 23):
            with do(model, Patch(place, clean, positions=[column])):
                plain = logprob(answer_logits(model, corrupt), corrupt) - base
            assert torch.allclose(values[-1, column], plain, atol=1e-4), (name, column)


def test_planted_heads_act_where_they_were_made_to():
    planted = Planted().build(5)
    batch = IOI().make(planted.tokenizer, 6, 0)
    at = {role: unit for unit, role in planted.truth.items()}
    method = ActivationPatching(metric="logit_diff")
    names, values = method.grid(planted.model, batch)
    gained = values.mean(-1)
    mover = gained[names.index(at["name mover"])]
    last = batch.ids.shape[1] - 1
    assert int(mover.argmax()) == last and float(mover[last]) > 10
    whole = Restore(metric="logit_diff").score(planted.model, batch)[at["name mover"]]
    assert float(mover[last]) == pytest.approx(whole, rel=1e-3)
    score = method.score(planted.model, batch)
    assert score[at["name mover"]] == pytest.approx(float(mover[last]), rel=1e-4)
    assert DirectAttribution().score(planted.model, batch).top(1) == [at["name mover"]]


def test_columns_in_front_of_the_first_change_gain_nothing():
    model, batch = ALL["llama"].build(), make("llama")
    same = batch.inputs["input_ids"].clone()
    same[:, 20:] = batch.corrupt["input_ids"][:, 20:]
    batch = replace(batch, corrupt={**batch.corrupt, "input_ids": same})
    _, values = ActivationPatching(site="resid_pre").grid(model, batch)
    assert float(values[:, :20].abs().max()) == 0 and float(values[0, 20:].abs().max()) > 0


def test_what_cannot_be_patched_is_a_sentence():
    with pytest.raises(ValueError, match="'pattern' is not patched column by column: z, resid_pre, attn, mlp are"):
        ActivationPatching(site="pattern").grid(ALL["llama"].build(), make("llama"))
