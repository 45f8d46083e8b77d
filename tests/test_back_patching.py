"""Back-patching: a state put back where it is changes nothing, a later one skips what lies between."""

import pytest
import torch
from families import ALL
from test_heads import make
from traces import traces

from headwise.do import Patch, do
from headwise.heads import BackPatching
from headwise.replicate.back_patching import BackPatching as Replicated
from headwise.tap import tap
from headwise.task import answer_logits, logprob


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_the_last_state_put_into_the_last_layer_runs_it_twice(kind):
    model, batch = ALL[kind].build(), make(kind)
    was = traces(model)
    method = BackPatching(stride=1, metric="logprob", rows=3)
    sources, targets, values = method.grid(model, batch)
    assert sources == targets == [0, 1] and values.shape == (2, 2, 4)
    assert values[0, 1].isnan().all() and values.isfinite().sum() == 12
    with torch.no_grad(), tap(model, "L0.resid_pre", "L0.resid_post", "L1.resid_post") as t:
        plain = logprob(answer_logits(model, batch), batch)
    state = t["L0.resid_pre"].clone()
    state[:, 23] = t["L1.resid_post"][:, 23]
    with torch.no_grad(), do(model, Patch("L0.resid_pre", state)):
        expected = logprob(answer_logits(model, batch), batch)
    assert torch.allclose(values[1, 0], expected, atol=1e-4) and not torch.allclose(values[1, 0], plain, atol=1e-3)
    assert traces(model) == was
    one, other = method.score(model, batch), BackPatching(stride=1, metric="logprob", unrelated=True).grid(model, batch)
    assert one.kind == "layer" and one.table["unit"].to_list() == ["L0", "L1"]
    assert one["L1"] == pytest.approx(float(values[1].mean(-1).max()), abs=1e-4)
    assert not torch.allclose(other[2][1, 0], values[1, 0], atol=1e-3)


def test_what_cannot_be_patched_is_a_sentence():
    model = ALL["llama"].build()
    with pytest.raises(ValueError, match="mark no span 'start'"):
        BackPatching(at="start").grid(model, make("llama"))
    with pytest.raises(ValueError, match="stride = 0 tries no layer"):
        BackPatching(stride=0).grid(model, make("llama"))
    with pytest.raises(ValueError, match="does not predict next"):
        BackPatching().grid(ALL["bert"].build(), make("bert"))


def test_outcomes_on_made_up_numbers():
    def judged(fixed, control):
        own, other = torch.zeros(2, 3, 3, 10), torch.zeros(2, 3, 3, 10)
        own[0, 2, 0, ::2][:fixed] = 1
        other[1, 1, 1, :control] = 1
        return Replicated()._judge(own, other, [20.0, 70.0, 70.0], 100).outcome

    assert judged(5, 1) == "holds"
    assert judged(5, 5) == "partly"
    assert judged(1, 0) == "fails"
