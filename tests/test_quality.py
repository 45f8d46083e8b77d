"""What is answered and predicted through a cache: as by the plain model where nothing is dropped, lost where it is."""

import dataclasses

import pytest
import torch
from families import FAMILIES, VOCAB
from transformers import DynamicCache

from headwise import recall
from headwise.cache import AdaKV, Duo, Pages, Preallocated, Quantised, Razor, SnapKV, Streaming
from headwise.data.held_out import HeldOut
from headwise.data.key_values import KeyValues
from headwise.data.needle import Needle
from headwise.data.passkeys import Passkeys
from headwise.data.planted import Planted
from headwise.data.repeated_tokens import RepeatedTokens
from headwise.data.verbatim import Verbatim
from headwise.kv_cache import KVCache, kv_units
from headwise.quality import TASKS, Quality, compare
from headwise.recall import bytes_of, perplexities, perplexity, retrieval, retrievals
from headwise.task import answer_logits, with_needle


@pytest.fixture(scope="module")
def planted():
    return Planted().build(seed=0)


@pytest.fixture(scope="module")
def needles(planted):
    return with_needle(Needle(length=150, depths=(0.1, 0.6)).make(planted.tokenizer, 4, 0))


@pytest.fixture(scope="module")
def tiny():
    return FAMILIES["llama"].build()


def unit_of(planted, role):
    layer, head = next(unit for unit, part in planted.truth.items() if part == role).split(".H")
    share = planted.model.config.num_attention_heads // planted.model.config.num_key_value_heads
    return f"{layer}.G{int(head) // share}"


def test_a_full_cache_finds_every_needle(planted, needles):
    found = retrieval(planted.model, planted.tokenizer, needles)
    assert found.right.shape == (4, 1) and found.right.all() and found.accuracy == 1
    assert found.tokens.shape == needles.answer.shape
    said = [planted.tokenizer.decode(row) for row in needles.answer]
    assert [row[0] for row in found.said] == said
    assert (found.bytes > 0).all()


@pytest.mark.parametrize("chunk", [None, 1, 40])
def test_any_full_cache_and_any_chunk_is_the_same(planted, needles, chunk):
    model = planted.model
    caches = (None, lambda: DynamicCache(config=model.config), lambda: Preallocated().build(model))
    for cache in caches:
        found = retrieval(model, planted.tokenizer, needles, cache, chunk)
        assert found.right.all()


def test_keeping_the_planted_head_keeps_the_answer_and_dropping_it_loses_it(planted, needles):
    model, policy = planted.model, Streaming(sink=2, recent=32)
    every = [f"L{layer}.G{g}" for layer in range(4) for g in range(model.config.num_key_value_heads)]
    mover = unit_of(planted, "retrieval")
    others = [unit for unit in every if unit != mover]
    kept = retrieval(model, planted.tokenizer, needles, lambda: policy.build(model, others))
    lost = retrieval(model, planted.tokenizer, needles, lambda: policy.build(model, [mover]))
    assert kept.accuracy == 1
    assert lost.accuracy == 0
    full = retrieval(model, planted.tokenizer, needles)
    assert (kept.bytes < full.bytes).all()


def test_the_question_is_read_apart_unless_told_otherwise(planted, needles):
    seen = []

    class Watched(DynamicCache):
        def update(self, key, value, layer, *args, **kwargs):
            if layer == 0:
                seen.append(key.shape[2])
            return super().update(key, value, layer, *args, **kwargs)

    one = needles.take([0])
    length, size = int(one.inputs["attention_mask"].sum()), one.answer.shape[1]
    asked = int(one.spans["question"][0, 1] - one.spans["question"][0, 0])
    retrieval(planted.model, planted.tokenizer, one, Watched)
    assert seen == [length - (size - 1) - asked, asked] + [1] * (size - 1)
    seen.clear()
    retrieval(planted.model, planted.tokenizer, one, Watched, apart=False)
    assert seen == [length - (size - 1)] + [1] * (size - 1)
    seen.clear()
    retrieval(planted.model, planted.tokenizer, one, Watched, chunk=50)
    assert max(seen) == 50 and sum(seen) == length


def test_teacher_forcing_is_one_plain_pass(planted):
    batch = RepeatedTokens(length=12).make(planted.tokenizer, 3, 1)
    with torch.no_grad():
        plain = answer_logits(planted.model, batch).argmax(-1) == batch.answer
    found = retrieval(planted.model, planted.tokenizer, batch, forced=True)
    assert torch.equal(found.tokens, plain)
    greedy = retrieval(planted.model, planted.tokenizer, batch)
    assert torch.equal(greedy.right, found.right), "one answer a prompt is right either way or neither"


# Each with the most tokens that it reads at once as if they came one by one.
POLICIES = {
    "own": (None, 10**6),
    "everything": (Preallocated(), 10**6),
    "streaming": (Streaming(4, 24), 10**6),
    "duo, prompts whole": (Duo(4, 24, whole=True), 24),
    "razor": (Razor(4, 24, single=5), 5),
    "snapkv": (SnapKV(8, 60), 7),
    "adakv": (AdaKV(8, 60), 7),
    "pages": (Pages(budget=16, page=4, piece=4, single=6), 6),
    "8 bits": (Quantised(8, of=Streaming(4, 24)), 10**6),
}


CASES = [*(("llama", name) for name in POLICIES), ("gemma2", "own"), ("gemma3", "own"), ("gemma3", "streaming")]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_what_is_known_beforehand_is_read_in_few_passes_and_gives_the_same(family, name, monkeypatch, codes):
    policy, most = POLICIES[name]
    model, tokenizer = FAMILIES[family].build(), _bytes()
    model.resize_token_embeddings(len(tokenizer))
    batch = KeyValues(length=300, pairs=4, asked=3, digits=3).make(tokenizer, 2, 0)
    cache = None if policy is None else lambda: policy.build(model)
    read, passes, said = recall._Past.read, [], []

    def watched(past, ids, columns):
        logits = read(past, ids, columns)
        passes.append(len(ids))
        said.append(logits)
        return logits

    def both():
        passes.clear()
        said.clear()
        found = retrieval(model, tokenizer, batch, cache, forced=True)
        lost = perplexity(model, batch.ids[:1, :200], cache, chunk=min(most, 5))
        return list(passes), torch.cat(said), found, lost

    monkeypatch.setattr(recall._Past, "read", watched)
    few, logits, found, lost = both()
    monkeypatch.setattr(recall._Past, "most", 1)
    many, alone, other, again = both()
    assert sum(few) == sum(many) and len(few) < len(many)
    assert all(n <= most or n in many for n in few), "contexts and questions longer than that stay as they are"
    torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.tokens, other.tokens) and torch.equal(found.bytes, other.bytes)
    torch.testing.assert_close(lost, again, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3"])
def test_several_caches_read_what_is_alike_once_and_answer_as_alone(family, whole, monkeypatch):
    model, tokenizer = FAMILIES[family].build(), _bytes()
    model.resize_token_embeddings(len(tokenizer))
    batch = KeyValues(length=300, pairs=4, asked=2, digits=3).make(tokenizer, 2, 0)
    units = kv_units(model)
    shuffled = {unit: Duo(4, 24, whole=whole) if i % 2 else Preallocated() for i, unit in enumerate(units)}
    caches = {
        "own": None,
        "duo": lambda: Duo(4, 24, whole=whole).build(model),
        "some": lambda: KVCache(model, shuffled),
        "wide": lambda: Duo(4, 60, whole=whole).build(model, units[:1]),
        "snapkv": lambda: SnapKV(8, 60).build(model),
        "theirs": lambda: DynamicCache(config=model.config),
    }
    read, passes = recall._Past.read, []

    def watched(past, ids, columns):
        passes.append(len(ids))
        return read(past, ids, columns)

    monkeypatch.setattr(recall._Past, "read", watched)
    answers, text = retrievals(model, tokenizer, batch, caches, forced=True), batch.ids[:2, :200]
    losses = perplexities(model, text, caches)
    together = sum(passes)
    passes.clear()
    for name, cache in caches.items():
        alone = retrieval(model, tokenizer, batch, cache, forced=True)
        assert torch.equal(answers[name].tokens, alone.tokens) and torch.equal(answers[name].bytes, alone.bytes)
        torch.testing.assert_close(losses[name], perplexity(model, text, cache), atol=1e-5, rtol=1e-5)
    contexts = [int(start) for start in batch.spans["question"][:, 0] - (batch.inputs["attention_mask"] == 0).sum(1)]
    alike = sum(contexts) + 2 * 100 if whole else 4 * 28
    assert sum(passes) - together == (3 * alike if family in ("llama", "gpt_neox") else 0)
    # In chunks every cache reads for itself.
    passes.clear()
    retrievals(model, tokenizer, batch, caches, 50, forced=True)
    assert sum(passes) > 6 * sum(contexts)


def test_greedy_answers_are_those_of_generate(tiny):
    ids = torch.randint(3, VOCAB, (3, 24), generator=torch.Generator().manual_seed(0))
    batch = RepeatedTokens(length=12).make(Planted(parts=("induction",)).build(0).tokenizer, 3)
    batch = dataclasses.replace(
        batch, inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, answer=ids[:, 13:], spans={}
    )

    class Numbers:
        def decode(self, ids):
            return " ".join(map(str, ids.tolist()))

    batch = dataclasses.replace(batch, at=torch.arange(12, 23).expand(3, -1))
    found = retrieval(tiny, Numbers(), batch)
    out = tiny.generate(ids[:, :13], max_new_tokens=11, do_sample=False, pad_token_id=0)
    assert [row[0] for row in found.said] == [Numbers().decode(row[13:]) for row in out]


def test_several_questions_are_several_answers(planted):
    tokenizer = _bytes()
    model = FAMILIES["llama"].build()
    model.resize_token_embeddings(len(tokenizer))
    batch = KeyValues(length=300, pairs=3, asked=2, digits=3).make(tokenizer, 2, 0)
    found = retrieval(model, tokenizer, batch)
    assert found.right.shape == (2, 2) and found.tokens.shape == batch.answer.shape
    assert all(len(row) == 2 for row in found.said)
    forced = retrieval(model, tokenizer, batch, forced=True)
    with torch.no_grad():
        plain = answer_logits(model, batch).argmax(-1) == batch.answer
    assert torch.equal(forced.tokens, plain)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_perplexity_is_the_loss_of_one_pass(family):
    model = FAMILIES[family].build()
    ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, 19:-1]
    plain = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 20:], reduction="none").mean(1)
    for chunk in (1, 7, 100):
        read = perplexity(model, ids, chunk=chunk)
        torch.testing.assert_close(read, plain, atol=1e-5, rtol=1e-5)
    again = perplexity(model, ids, lambda: DynamicCache(config=model.config), prefill=20, chunk=7)
    torch.testing.assert_close(again, plain, atol=1e-5, rtol=1e-5)
    assert perplexity(model, ids, prefill=39).shape == (2,)


def test_dropping_keys_shows_in_perplexity(planted):
    batch = RepeatedTokens(length=40).make(planted.tokenizer, 2)
    full = perplexity(planted.model, batch.ids, prefill=45)
    less = perplexity(planted.model, batch.ids, lambda: Streaming(2, 8).build(planted.model), prefill=45, chunk=4)
    assert (less > full + 1).all()


def test_caches_are_compared_on_the_same_prompts(planted, needles):
    model, tokenizer = planted.model, planted.tokenizer
    text = RepeatedTokens(length=30).make(tokenizer, 3)
    caches = {"full": None, "stream": lambda: Streaming(2, 16).build(model)}
    both = compare(model, tokenizer, caches, at=150, given={"needle": needles, "text": text})
    full, stream = both["full"], both["stream"]
    assert full.accuracy == {"needle": 1.0} and stream.accuracy == {"needle": 0.0}
    assert full.n == {"needle": 4, "text": 3 * 31} and full.low["needle"] < 1 == round(full.high["needle"], 6)
    assert full.nll_low <= full.nll <= full.nll_high < stream.nll
    assert stream.kept(full) == 0 and full.kept(full) == 1 and full.kept(stream) is None
    assert stream.bytes < full.bytes and full.retrieval == 1
    assert isinstance(full, Quality) and len(full.losses) == 3
    with pytest.raises(ValueError, match="at 99 tokens, seed 0.*one call of compare"):
        stream.kept(dataclasses.replace(full, at=99))


def test_nothing_stays_behind(planted, needles):
    model = planted.model
    before = model.config._attn_implementation
    model.train()
    retrieval(model, planted.tokenizer, needles.take([0]), lambda: Streaming(2, 16).build(model))
    assert model.training and model.config._attn_implementation == before
    model.eval()


def test_bytes_are_those_of_the_tensors(tiny):
    cache = DynamicCache(config=tiny.config)
    assert bytes_of(cache) == 0
    with torch.no_grad():
        tiny(input_ids=torch.ones(1, 10, dtype=torch.long), past_key_values=cache, use_cache=True)
    layers, heads, size = tiny.config.num_hidden_layers, tiny.config.num_key_value_heads, tiny.config.head_dim
    assert bytes_of(cache) == 2 * layers * heads * size * 10 * 4


def test_bad_requests_are_answered_in_a_sentence(planted, needles, tiny):
    model, tokenizer = planted.model, planted.tokenizer
    used = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=needles.ids[:1, :5], past_key_values=used, use_cache=True)
    ids = torch.ones(1, 10, dtype=torch.long)
    for run, sentence in (
        (lambda: retrieval(model, tokenizer, needles, chunk=0), "A chunk of 0 tokens"),
        (lambda: retrieval(model, tokenizer, needles, lambda: used), "holds 5 tokens; each prompt needs a fresh one"),
        (lambda: perplexity(tiny, ids, prefill=10), "prefill of 10 tokens.*allows 1 to 9"),
        (lambda: compare(model, tokenizer, {}, given={"riddle": needles}), "'riddle' is no task.*passkey, needle"),
        (lambda: retrieval(model, tokenizer, _uneven(needles)), "Row 1 has answers of .* must be the same"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run()


def _uneven(batch):
    at = batch.at.clone()
    at[1, 0] -= 3
    return dataclasses.replace(batch, at=at)


def test_tasks_are_named_once():
    assert list(TASKS) == ["passkey", "needle", "keys", "copy", "text"]


def _bytes():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({char: i for i, char in enumerate(["<bos>", *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>")


def test_secrets_stand_once_in_the_prose_and_once_at_the_end():
    tokenizer = _bytes()
    for task, stem in ((Passkeys(900, 3, 3), 'Passkey "'), (KeyValues(900, 4, 3), '"')):
        batch = task.make(tokenizer, 3, 1)
        for row, text in enumerate(batch.texts):
            asked = getattr(task, "asked", 1)
            for i in range(asked):
                low, high = batch.spans[f"hidden_{i}"][row]
                start, stop = batch.spans[f"answer_{i}"][row]
                assert torch.equal(batch.ids[row, low:high], batch.ids[row, start:stop])
                assert high <= batch.spans["question"][row, 0] <= start
                said = tokenizer.decode(batch.ids[row, start:stop]).strip()
                assert text.count(f" {said}") == 2
            assert text.count(stem) >= 2
        assert torch.equal(batch.ids.gather(1, batch.at + 1), batch.answer)
        assert batch.ids.shape[1] <= 900
        assert batch.about["length"] == 900


def test_a_passage_is_begun_again_at_the_end():
    batch = Verbatim(length=600, shown=20, answers=6).make(_bytes(), 4, 1)
    for row in range(4):
        low, high = batch.spans["hidden_0"][row]
        start, stop = batch.spans["question"][row]
        assert high < start and stop - start == 26
        assert torch.equal(batch.ids[row, low : low + 26], batch.ids[row, start:stop])
        assert not torch.equal(batch.corrupt["input_ids"][row, low:high], batch.ids[row, low:high])
    assert torch.equal(batch.ids.gather(1, batch.at + 1), batch.answer) and batch.answer.shape == (4, 6)


def test_held_out_text_is_real_and_may_be_ones_own(tmp_path):
    tokenizer = _bytes()
    batch = HeldOut(length=300).make(tokenizer, 3, 0)
    assert batch.ids.shape == (3, 300) and len(set(batch.texts)) == 3
    assert torch.equal(batch.ids.gather(1, batch.at + 1), batch.answer)
    assert len(batch.about["text"]) == 16
    mine = tmp_path / "mine.txt"
    mine.write_text("\n\n".join(f"Paragraph {i} speaks of {i * i} things." for i in range(40)))
    own = HeldOut(length=100, path=str(mine)).make(tokenizer, 2, 0)
    assert "things" in own.texts[0] and own.about["text"] != batch.about["text"]
    for task, sentence in (
        (HeldOut(length=9000, path=str(mine)), "has fewer than the 9000 tokens"),
        (HeldOut(path=str(tmp_path / "none.txt")), "cannot be read as text"),
        (HeldOut(length=1), "predict nothing"),
        (Passkeys(asked=3), "2 passkeys with 3 asked for"),
        (Passkeys(words=20), "Passkeys of 20 words"),
        (Passkeys(length=40), "40 tokens have no room"),
        (KeyValues(pairs=99), "99 lines with 1 asked for"),
        (KeyValues(digits=9), "Numbers of 9 digits"),
        (Verbatim(shown=0), "A passage with 0 tokens shown and 8 to copy"),
    ):
        with pytest.raises(ValueError, match=sentence):
            task.make(tokenizer, 2)
