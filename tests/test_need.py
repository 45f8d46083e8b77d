"""Which KV heads need everything: windows against their naive twin, planted heads, decoys that need nothing."""

from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES
from traces import traces

from headwise import narrow, shares
from headwise.anatomy import anatomy
from headwise.attach import caching
from headwise.cache import Duo
from headwise.data import Needle, Planted, RepeatedTokens
from headwise.data.planted import PlantedModel
from headwise.do import Add, Zero, do
from headwise.heads import DuoGate, Need
from headwise.kv_cache import kv_units
from headwise.narrow import Window, alone, kv_heads, narrowed, pads_of, streaming
from headwise.scan import effects
from headwise.shares import Step, answers, descend, smallest
from headwise.task import Batch, answer_logits, logprob

DECODERS = [name for name, family in FAMILIES.items() if family.kind == "decoder"]
WINDOW = Window(sink=1, recent=3)


def make(name: str = "llama", padded: bool = True, rows: int = 3) -> tuple:
    family = FAMILIES[name]
    inputs = family.inputs(rows, padded=padded)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    answer = torch.arange(2 * rows).view(rows, 2) % 50 + 5
    return family.build(), Batch(inputs, torch.tensor([[7, 9]] * rows), answer)


def hidden_keys(model, units, window: Window, width: int, pads=None, start: int = 0):
    """The naive twin: scores of keys outside the window are lowered, in the open."""
    body, columns = anatomy(model), torch.arange(width)
    seen = window.sees(columns, columns, pads) | (columns < start)[:, None]
    edits = []
    for layer in body.layers:
        heads = [h for h in range(body.heads(layer)) if f"L{layer}.G{body.group(layer, h)}" in units]
        if heads:
            bias = torch.zeros(len(seen), body.heads(layer), width, width)
            bias[:, heads] = torch.where(seen, 0.0, -1e30)
            edits.append(Add(f"L{layer}.scores", bias))
    return do(model, *edits)


def test_who_sees_whom_by_hand():
    columns = torch.arange(6)
    seen = WINDOW.sees(columns, columns)[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 0, 1, 1, 1, 0],
        [1, 0, 0, 1, 1, 1],
    ]
    padded = WINDOW.sees(columns[-1:], columns, torch.tensor([0, 2]))[:, 0, 0].int().tolist()
    assert padded == [[1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_a_window_equals_hidden_keys(name, padded):
    model, batch = make(name, padded)
    pads, units = pads_of(batch), kv_heads(model)[::2]
    real = batch.inputs["attention_mask"].bool()
    with torch.no_grad():
        plain = model(**batch.inputs).logits
        with streaming(model, units, WINDOW, pads=pads):
            narrow = model(**batch.inputs).logits
        with hidden_keys(model, units, WINDOW, 10, pads):
            naive = model(**batch.inputs).logits
        with streaming(model, units, Window(0, 10), pads=pads):
            all_seen = model(**batch.inputs).logits
    torch.testing.assert_close(narrow[real], naive[real], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(all_seen[real], plain[real], rtol=1e-5, atol=2e-5)
    assert float((narrow - plain)[real].abs().max()) > 0.1


# Without those that PyTorch's attention is not called for (soft caps, sinks), and those whose recurrent layers
# write into the past in place, so that nothing can be trained behind one.
OTHERS = {"gemma2", "gpt_oss", "qwen3_next", "qwen3_5"}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [name for name in DECODERS if name not in OTHERS])
def test_keys_in_no_window_are_not_read(name, padded, monkeypatch):
    """Against reading all of them: logits, slopes of gates, and how many keys attention was given."""
    model, batch = make(name, padded, rows=2)
    body, mask, widths = anatomy(model), batch.inputs["attention_mask"], []
    gates = {n: torch.full((body.heads(n), 1), 0.3, requires_grad=True) for n in body.layers}
    attention = torch.nn.functional.scaled_dot_product_attention

    def noting(query, key, *rest, **options):
        widths.append(key.shape[2])
        return attention(query, key, *rest, **options)

    def mixed(layer, z, near):
        widths.clear()
        other = near()
        return other + gates[layer] * (z - other)

    def run() -> tuple:
        past = model(batch.ids[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values
        with narrowed(model, Window(1, 1), mixed, pads=pads_of(batch)):
            logits = model(batch.ids[:, 8:], attention_mask=mask, past_key_values=past).logits
        return widths[0], logits, *torch.autograd.grad(logits.square().mean(), list(gates.values()))

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    few, *got = run()
    monkeypatch.setattr(narrow, "FEW", 0)
    every, *want = run()
    assert few < every
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen3_next", "gpt_neox"])
def test_effects_of_a_window_equal_full_passes(name):
    model, batch = make(name)
    units = kv_heads(model)
    shared = effects(model, batch, units, WINDOW, variants=2)
    assert shared.how == "stream"
    with torch.no_grad():
        for unit in units:
            with hidden_keys(model, [unit], WINDOW, 10, pads_of(batch)):
                naive = logprob(answer_logits(model, batch), batch)
            torch.testing.assert_close(shared.of(unit), shared.base - naive, rtol=0, atol=2e-5)


def test_kv_heads_are_taken_away_with_all_that_read_them():
    model, batch = make()
    whole = effects(model, batch, ["L1.G1"], "zero")
    with torch.no_grad(), do(model, Zero("L1.H2"), Zero("L1.H3")):
        naive = logprob(answer_logits(model, batch), batch)
    torch.testing.assert_close(whole.of("L1.G1"), whole.base - naive, rtol=0, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen3_next"])
def test_answers_under_several_choices_equal_hidden_keys(name, whole):
    model, batch = make(name)
    units = kv_heads(model)
    choices = [(), units, units[:1], units[1:]]
    got = answers(model, batch, choices, WINDOW, whole=whole, at_once=3)
    assert got.logprob.shape == got.found.shape == (4, 3)
    with torch.no_grad():
        for row in range(3):
            one = alone(batch, row)
            width, start = one.ids.shape[1], int(one.at.min()) if whole else 0
            for i, choice in enumerate(choices):
                with hidden_keys(model, choice, WINDOW, width, start=start):
                    naive = logprob(answer_logits(model, one), one)
                assert float(got.logprob[i, row]) == pytest.approx(float(naive), abs=2e-5)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_choices_begin_at_the_first_layer_they_change(name, whole, monkeypatch):
    """Against the same without it; what the first block runs is counted."""
    model, batch = make(name, rows=1)
    before = traces(model)
    deep = [unit for unit in kv_heads(model) if not unit.startswith("L0.")]
    choices, runs = [(), *([unit] for unit in deep * 4)], []
    inside = next(anatomy(model).blocks[""][0].children())
    hook = inside.register_forward_hook(lambda *_: runs.append(1))
    got = answers(model, batch, choices, WINDOW, whole=whole, at_once=2)
    begun = len(runs)
    monkeypatch.setattr(shares, "_beginnings", lambda *_: lambda *_: nullcontext())
    want = answers(model, batch, choices, WINDOW, whole=whole, at_once=2)
    hook.remove()
    assert begun < len(runs) - begun
    torch.testing.assert_close(got.logprob, want.logprob, rtol=0, atol=2e-5)
    assert traces(model) == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "qwen3_next"])
def test_a_cache_in_two_parts_equals_the_window(name):
    model, batch = make(name, padded=False)
    units, full = kv_units(model), kv_units(model)[::2]
    with torch.no_grad():
        with streaming(model, [unit for unit in units if unit not in full], WINDOW):
            masked = model(input_ids=batch.ids).logits
        with caching(model):
            cache = Duo(sink=1, recent=3).split(model, full)
            parts = [model(input_ids=ids, past_key_values=cache).logits for ids in batch.ids.split((7, 2, 1), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), masked, rtol=1e-4, atol=1e-4)


# Planted heads.


@pytest.fixture(scope="module")
def planted() -> PlantedModel:
    return Planted(parts=("retrieval",), decoys=("mute",), kv_heads=3).build(seed=2)


@pytest.fixture(scope="module")
def needles(planted) -> Batch:
    return Needle(length=160, depths=(0.1, 0.3, 0.5)).make(planted.tokenizer, 3)


def unit_of(planted: PlantedModel, role: str) -> str:
    layer, head = next(u for u, what in (planted.truth | planted.decoys).items() if what == role).split(".H")
    return f"{layer}.G{int(head) // 2}"


@pytest.mark.parametrize("whole", [False, True])
def test_the_planted_retrieval_head_needs_everything(planted, needles, whole):
    score = Need(sink=4, recent=32, whole=whole).score(planted.model, needles)
    assert score.kind == "kv" and score.evidence == "needed" and len(score.table) == 12
    best, second = score.top(2)
    assert best == unit_of(planted, "retrieval")
    assert score[best] > 3 and abs(score[second]) < 1e-3
    assert abs(score[unit_of(planted, "mute")]) < 1e-3
    naive = Need(sink=4, recent=32, whole=whole, share_prefix=False, variants=1).score(planted.model, needles)
    assert all(abs(score[u] - naive[u]) < 1e-5 for u in score.table["unit"])


@pytest.mark.parametrize("whole", [False, True])
def test_the_gate_of_the_planted_retrieval_head_stays_open(planted, needles, whole):
    before = traces(planted.model)
    score = DuoGate(sink=4, recent=32, steps=30, lr=0.1, penalty=0.005, whole=whole).score(planted.model, needles)
    best, second = score.top(2)
    assert best == unit_of(planted, "retrieval")
    assert score[best] > 0.8 and score[second] < 0.1
    assert traces(planted.model) == before


def test_shares_fall_where_the_planted_head_streams(planted, needles):
    score = Need(sink=4, recent=32).score(planted.model, needles)
    steps = descend(planted.model, needles, score, (0.5, 0.1, 0.0), Window(4, 32))
    assert [step.full for step in steps] == [12, 6, 1, 0]
    assert [step.found for step in steps] == [1.0, 1.0, 1.0, 0.0]
    assert steps[2].loss == pytest.approx(0, abs=1e-3) and steps[3].loss > 3
    assert smallest(steps).full == 1
    backwards = descend(planted.model, needles, score.top(12)[::-1], (0.5,), Window(4, 32))
    assert backwards[1].found == 0.0


def test_one_of_two_twins_is_not_needed_but_both_are():
    twins = Planted(parts=("induction",), decoys=("twin",)).build(seed=1)
    batch = RepeatedTokens(length=40).make(twins.tokenizer, 2)
    pair = {f"{u.split('.')[0]}.G{u.split('.H')[1]}" for u in twins.decoys}
    score = Need(sink=2, recent=16).score(twins.model, batch)
    assert all(abs(score[u]) < 0.2 for u in pair)
    got = answers(twins.model, batch, [(), pair], Window(2, 16))
    assert float((got.logprob[0] - got.logprob[1]).min()) > 3
    gates = DuoGate(sink=2, recent=16, steps=30, lr=0.1, penalty=0.005, whole=False).score(twins.model, batch)
    assert max(gates[u] for u in pair) > 0.4
    assert set(gates.top(2)) == pair


def test_the_model_is_whole_after_an_error():
    model, batch = make()
    before = traces(model)

    def broken(layer, z, near):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), narrowed(model, WINDOW, broken):
        model(**batch.inputs)
    with pytest.raises(IndexError):
        beyond = Batch(batch.inputs, batch.at + 90, batch.answer)
        DuoGate(steps=2, whole=False).score(model, beyond)
    assert traces(model) == before


def test_sentences():
    model, batch = make()
    with pytest.raises(ValueError, match="recent 0; allowed"):
        Window(recent=0)
    with pytest.raises(ValueError, match="'L9.G0' is not a KV head"), streaming(model, ["L9.G0"]):
        pass
    with pytest.raises(ValueError, match="Only heads of the main stack"):
        effects(model, batch, ["L1.mlp"], WINDOW)
    with pytest.raises(ValueError, match="L1 has KV heads|heads 0 to 1"):
        effects(model, batch, ["L1.G2"], WINDOW)
    with pytest.raises(ValueError, match="steps = 0"):
        DuoGate(steps=0).score(model, batch)
    with pytest.raises(ValueError, match="shares"):
        descend(model, batch, kv_heads(model), (1.5,))
    with pytest.raises(ValueError, match="A ranking of 1 KV heads"):
        descend(model, batch, ["L0.G0"])
    with pytest.raises(ValueError, match="No answer is found"):
        smallest([Step(4, 1.0, 0.0, 0.0, ())])
    with pytest.raises(ValueError, match="no context stands before"):
        answers(model, Batch(batch.inputs, torch.zeros(3, 1, dtype=torch.long), batch.answer[:, :1]), [()], whole=True)
