"""The decode room: with drafts a model generates what it generates alone, whatever drafts, cache and batch."""

from collections.abc import Mapping

import pytest
import torch
from families import FAMILIES, VOCAB
from oracles import Oracle, Says
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import headwise as hw
from headwise import accepting
from headwise.attach import caching, treated
from headwise.drafting import ALL, DIFFERS, STOPPED, Draft, Drafter, News, Reading
from headwise.kv_cache import CacheMethod, KVCache
from headwise.verifying import DraftMethod, Verifying, run

TOKENS = 24
D = hw.decode
DECODERS = [name for name, family in FAMILIES.items() if family.kind == "decoder"]
CACHES: dict[str, CacheMethod | None] = {
    "dynamic": None,
    "preallocated": hw.cache.Preallocated(),
    "duo": hw.cache.Duo(sink=2, recent=5),
    "duo, whole prompts": hw.cache.Duo(sink=2, recent=4, whole=True),
    "streaming": hw.cache.Streaming(sink=2, recent=5),
    "snapkv": hw.cache.SnapKV(window=4, capacity=8, kernel=1),
    "adakv": hw.cache.AdaKV(window=4, capacity=8, kernel=1),
    "pages": hw.cache.Pages(budget=12, page=4, piece=2, interval=2),
    "razor": hw.cache.Razor(sink=2, recent=6),
}
METHODS = {
    "copyspec": D.CopySpec(gamma=2, tokens=6),
    "prompt_lookup": D.PromptLookup(),
    "head_copying": D.HeadCopying(heads=("L0.H1", "L1.H2"), least=0.0),
    "either": D.Either(D.CopySpec(gamma=3), D.HeadCopying(heads=("L1.H0",), least=0.1)),
    "paced": D.Paced(D.Either(D.CopySpec(gamma=2, tokens=16), D.HeadCopying(heads=("L1.H0",), least=0)), most=16),
}


def prompts(name: str, rows: int, length: int = 16) -> dict[str, Tensor]:
    """Inputs of a family that repeat themselves, rows of different lengths."""
    inputs = FAMILIES[name].inputs(rows=rows, padded=rows > 1, length=length)
    half = length // 2
    inputs["input_ids"][:, half:] = inputs["input_ids"][:, -half:].roll(1, 1).clamp_min(3)
    inputs["input_ids"][:, half:] = inputs["input_ids"][:, half : half + 4].repeat(1, half)[:, :half]
    if "attention_mask" in inputs:
        inputs["input_ids"] *= inputs["attention_mask"]
    return inputs


def options(inputs: dict[str, Tensor], tokens: int = TOKENS, **more) -> dict:
    said = {name: value for name, value in inputs.items() if name != "input_ids"}
    return {**said, "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, **more}


def plain(model: PreTrainedModel, inputs: dict[str, Tensor], **more) -> Tensor:
    return model.generate(inputs["input_ids"], **options(inputs, **more))


def guessed(model: PreTrainedModel, inputs: dict[str, Tensor], right: Tensor, trees: bool, seed: int = 0, **more):
    width = inputs["input_ids"].shape[1]
    loop = Verifying(Oracle([row[width:].tolist() for row in right], trees, seed))
    return run(loop, model, inputs["input_ids"], options(inputs, **more))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", DECODERS)
def test_every_family_generates_its_own_tokens(name: str, rows: int) -> None:
    model, inputs = FAMILIES[name].build(), prompts(name, rows)
    right = plain(model, inputs)
    try:
        for trees in (False, True):
            found = guessed(model, inputs, right, trees)
            assert torch.equal(found.ids, right)
            assert found.stats.per_pass > 1 or trees
        for method in METHODS.values():
            assert torch.equal(method.generate(model, inputs["input_ids"], **options(inputs)).ids, right)
    except ValueError as refusal:
        assert "cannot take tokens back" in str(refusal) and "linear_attention" in model.config.layer_types
    assert torch.equal(plain(model, inputs), right)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_every_cache_generates_its_own_tokens(name: str, cache: str, rows: int) -> None:
    model, inputs = FAMILIES[name].build(), prompts(name, rows)
    with treated(model, CACHES[cache]):
        right = plain(model, inputs)
        for seed, trees in enumerate((False, True)):
            found = guessed(model, inputs, right, trees, seed)
            assert torch.equal(found.ids, right)
            if not trees:
                assert found.stats.per_pass > 1.1
        for method in METHODS.values():
            assert torch.equal(method.generate(model, inputs["input_ids"], **options(inputs)).ids, right)


def test_prompts_may_be_read_in_chunks() -> None:
    model = FAMILIES["llama"].build()
    for cache in ("dynamic", "preallocated", "streaming"):
        for rows in (1, 4):
            inputs = prompts("llama", rows)
            with treated(model, CACHES[cache]):
                right = plain(model, inputs, prefill_chunk_size=5)
                assert torch.equal(guessed(model, inputs, right, True, prefill_chunk_size=5).ids, right)
                for method in METHODS.values():
                    how = options(inputs, prefill_chunk_size=5)
                    assert torch.equal(method.generate(model, inputs["input_ids"], **how).ids, right)


def test_drafts_grow_while_they_are_accepted_and_fall_when_not() -> None:
    model, inputs = FAMILIES["llama"].build(), prompts("llama", 1)
    right = plain(model, inputs, tokens=60)[0, inputs["input_ids"].shape[1] :].tolist()
    sent: list[int] = []

    class Knows(Says):
        def begin(self, model: PreTrainedModel, texts: list[list[int]], sampling: bool) -> None:
            self.said = 0

        def accept(self, news: Mapping[int, News], read: Reading) -> None:
            self.said += len(news[0].tokens)
            sent.append(len(news[0].tokens) - 1)

        def propose(self, rooms: Mapping[int, int]) -> dict[int, Draft]:
            good = right[self.said : self.said + 40]
            return {0: Draft(good if self.said < 30 else [token ^ 1 for token in good])}

    class Method(DraftMethod):
        def drafter(self, model: PreTrainedModel) -> Drafter:
            return Knows(Draft([]))

    paced = D.Paced(Method(), start=2, least=1, most=16)
    found = paced.generate(model, inputs["input_ids"], **options(inputs, tokens=60))
    assert found.ids[0, inputs["input_ids"].shape[1] :].tolist() == right
    assert sent[:5] == [0, 2, 4, 8, 16] and found.stats.drafted <= 2 + 4 + 8 + 16 + 16 + 30


def test_rows_of_a_batch_are_what_they_are_alone_and_do_not_wait() -> None:
    model, inputs = FAMILIES["llama"].build(), prompts("llama", 4)
    found = D.CopySpec(gamma=2).generate(model, inputs["input_ids"], **options(inputs))
    passes = []
    for row in range(4):
        real = inputs["attention_mask"][row].bool()
        alone = D.CopySpec(gamma=2).generate(model, inputs["input_ids"][row][real][None], **options({}))
        assert torch.equal(alone.ids[0, int(real.sum()) :], found.ids[row, real.shape[0] :])
        passes.append(alone.stats.passes)
    assert found.stats.passes == max(passes)


def test_a_row_that_ends_leaves_and_is_padded() -> None:
    model, inputs = FAMILIES["llama"].build(), prompts("llama", 4)
    width = inputs["input_ids"].shape[1]
    right = plain(model, inputs)
    for end in {int(right[0, width + 3]), int(right[2, width + 9])}:
        how = {"eos_token_id": end, "pad_token_id": 0}
        ended = plain(model, inputs, **how)
        assert (ended[:, -1] == 0).any() or ended.shape[1] < right.shape[1]
        for cache in ("dynamic", "preallocated", "streaming"):
            with treated(model, CACHES[cache]):
                ended = plain(model, inputs, **how)
                for trees in (False, True):
                    assert torch.equal(guessed(model, inputs, right, trees, **how).ids, ended)


def test_a_text_ends_inside_a_draft() -> None:
    model, inputs = FAMILIES["llama"].build(), prompts("llama", 1)
    right = plain(model, inputs, eos_token_id=None)
    width = inputs["input_ids"].shape[1]
    made = right[0, width:].tolist()
    end = next(token for place, token in enumerate(made) if place > 3 and token not in made[:place])
    ended = plain(model, inputs, eos_token_id=end)
    found = guessed(model, inputs, right, False, seed=3, eos_token_id=end)
    assert torch.equal(found.ids, ended) and found.ids[0, -1] == end
    assert found.stats.why[STOPPED] == 1


class _Sees(StoppingCriteria):
    """Stops where two tokens follow each other."""

    def __init__(self, first: int, second: int) -> None:
        self.pair = (first, second)

    def __call__(self, input_ids: Tensor, scores, **_) -> Tensor:
        return (input_ids[:, -2] == self.pair[0]) & (input_ids[:, -1] == self.pair[1])


def test_criteria_and_processors_of_the_caller_hold_inside_drafts() -> None:
    model, inputs = FAMILIES["llama"].build(), prompts("llama", 1)
    width = inputs["input_ids"].shape[1]
    right = plain(model, inputs)
    seen = StoppingCriteriaList([_Sees(int(right[0, width + 6]), int(right[0, width + 7]))])
    ended = plain(model, inputs, stopping_criteria=seen)
    assert torch.equal(guessed(model, inputs, right, False, stopping_criteria=seen).ids, ended)
    allowed = {"prefix_allowed_tokens_fn": lambda row, said: range(3 + row, VOCAB, 2)}
    shorter = {"min_new_tokens": 8, "eos_token_id": 5}
    for how in ({"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}, shorter, allowed):
        for rows in (1, 4):
            inputs = prompts("llama", rows)
            asked = plain(model, inputs, **how)
            for trees in (False, True):
                found = guessed(model, inputs, asked, trees, **how)
                assert torch.equal(found.ids, asked) and found.stats.per_pass > 1


class _Shown(BaseStreamer):
    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.over = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.over = True


def test_a_streamer_gets_the_prompt_and_then_tokens_as_they_are_accepted() -> None:
    model, inputs = FAMILIES["llama"].build(), prompts("llama", 1)
    shown = _Shown()
    found = D.PromptLookup().generate(model, inputs["input_ids"], shown, **options(inputs))
    assert shown.over and sum(shown.parts, []) == found.ids[0].tolist()
    assert shown.parts[0] == inputs["input_ids"][0].tolist() and max(map(len, shown.parts[1:])) > 1
    with pytest.raises(ValueError, match="A streamer shows one row; 2 were given"):
        D.PromptLookup().generate(model, inputs["input_ids"].repeat(2, 1), _Shown(), max_new_tokens=2)


@pytest.mark.parametrize("cache", ["dynamic", "preallocated", "streaming"])
def test_a_conversation_goes_on_with_its_cache(cache: str) -> None:
    model, inputs = FAMILIES["llama"].build(), prompts("llama", 1)

    def new() -> DynamicCache | KVCache:
        method = CACHES[cache]
        return DynamicCache(config=model.config) if method is None else method.build(model)

    def twice(draft: bool) -> Tensor:
        kept, ids = new(), inputs["input_ids"]
        for _ in range(2):
            how = {"max_new_tokens": 8, "do_sample": False, "past_key_values": kept, "pad_token_id": 0}
            if draft:
                ids = D.HeadCopying(heads=("L0.H1",), least=0).generate(model, ids, **how).ids
                assert kept.get_seq_length() == ids.shape[1] - 1
                assert not any(getattr(layer, "record_past", False) for layer in kept.layers)
            else:
                with caching(model):
                    ids = model.generate(ids, **how)
            ids = torch.cat([ids, torch.tensor([[7, 8, 9, 7]])], 1)
        return ids

    assert torch.equal(twice(True), twice(False))


def test_what_became_of_drafts_is_counted() -> None:
    model, inputs = FAMILIES["llama"].build(), prompts("llama", 4)
    heard: list[int] = []
    loop = Verifying(D.CopySpec(gamma=2).drafter(model), heard=lambda stats: heard.append(stats.tokens))
    ids = model.generate(inputs["input_ids"], custom_generate=loop, **options(inputs))
    stats = loop.stats
    assert stats.tokens == 4 * TOKENS == (ids[:, inputs["input_ids"].shape[1] :] != -1).sum()
    assert stats.rows == 4 and stats.turns == sum(stats.why.values())
    assert stats.accepted == sum(length * count for length, count in stats.lengths.items())
    own = stats.tokens - stats.rows - stats.accepted
    assert stats.turns - stats.why[STOPPED] <= own <= stats.turns
    assert {"copyspec"} <= set(stats.sources) <= {"copyspec", "copyspec, taken up"}
    assert [sum(one) for one in zip(*stats.sources.values(), strict=True)][1:] == [stats.drafted, stats.accepted]
    assert set(stats.why) <= {ALL, DIFFERS, STOPPED, "no room", "the last 2 tokens are new"}
    assert heard == sorted(heard) and heard[-1] == stats.tokens and len(heard) == stats.passes
    assert stats.data()["per_pass"] == pytest.approx((stats.tokens - 4) / stats.turns)
    assert 0 < stats.prefill < stats.seconds and stats.tokens_per_second > 0


def test_the_dictionary_form_carries_the_cache() -> None:
    model, inputs = FAMILIES["llama"].build(), prompts("llama", 1)
    loop = Verifying(D.PromptLookup().drafter(model))
    found = model.generate(inputs["input_ids"], custom_generate=loop, return_dict_in_generate=True, **options(inputs))
    assert torch.equal(found.sequences, plain(model, inputs))
    assert found.past_key_values.get_seq_length() == found.sequences.shape[1] - 1


def test_rules_read_eos_and_length_from_the_criteria() -> None:
    config = GenerationConfig(max_length=6, do_sample=False)
    rules = accepting.Rules(LogitsProcessorList(), StoppingCriteriaList(), config, 1)
    line = accepting.Line(torch.tensor([1, 2]), rules.most)
    known = rules.read(torch.eye(8)[None, [3, 4, 5, 6]])
    walk = rules.walk(known[0], 0, Draft([3, 4, 7]), line)
    assert walk.tokens == [3, 4, 5] and walk.path == [0, 1] and walk.why == DIFFERS and not walk.stopped
    assert rules.walk(known[0], 3, Draft([]), line).stopped and line.room == 0
