"""Copying (s002): what the lesson promises, mixers of Tiny that are no attention, and the experiment."""

from dataclasses import replace

import pytest
import torch

from headwise import replicate
from headwise.attention import CCA, HGRN2
from headwise.data import Copying
from headwise.do import Zero, do
from headwise.lab import ConstantMemory, Tiny, TinyConfig, train
from headwise.tap import tap


def tiny(**more) -> Tiny:
    lesson = Copying(count=9)
    options = {"layers": 2, "heads": 2, "width": 32, "mlp": 16, "mixer": {"name": "attention.hgrn2"}} | more
    return TinyConfig(**lesson.config(**options)).build(0).eval()


def test_a_copy_says_the_letters_again_and_its_source_is_where_they_stood():
    lesson = Copying(letters=5, count=7)
    batch = lesson.make(None, 20, 1)
    ids = batch.ids
    assert ids.shape == (20, 14) and (ids[:, 7] == 5).all() and torch.equal(ids[:, 8:], ids[:, :6])
    assert torch.equal(batch.answer, ids[:, :7])
    (source,) = lesson.cells(batch)["source"]
    assert not source[:7].any() and torch.equal(ids[:, source.int().argmax(-1)[7:]], batch.answer)
    assert torch.equal(lesson.said(batch)[:, :7], batch.answer) and (lesson.said(batch)[:, 7:] == -1).all()
    perfect = 50.0 * torch.nn.functional.one_hot(batch.answer, 5)
    assert lesson.loss(perfect, batch).max() < 1e-6 and lesson.metrics(perfect, batch)["exact"].all()
    wrong = perfect.roll(1, -1)[:, :1]
    found = lesson.metrics(torch.cat([wrong, perfect[:, 1:]], 1), batch)
    assert not found["exact"].any() and torch.allclose(found["accuracy"], torch.tensor(6 / 7))
    assert lesson.remembered(7) == 1.0 and lesson.remembered(0) == pytest.approx(0.2)
    assert lesson.loss(torch.zeros(20, 7, 5), batch).mean().item() == pytest.approx(lesson.lines()["chance"])
    with pytest.raises(ValueError, match="cannot be copied"):
        Copying(letters=1)


def test_a_memory_made_by_hand_copies():
    method, draw = HGRN2(keep=0.0, block=4), torch.Generator().manual_seed(0)
    letters, eye = torch.randn(1, 1, 6, 5, generator=draw), 60 * torch.eye(6)[None, None]
    # Each token opens its own slot and no other; afterwards all slots stay shut and are read one by one.
    key = torch.cat([2 * eye - 60, torch.full_like(eye, -60)], 2)
    query = torch.cat([torch.zeros_like(eye), eye], 2)
    z = method.attend(query, key, torch.cat([letters, torch.zeros(1, 1, 6, 5)], 2))
    torch.testing.assert_close(z[:, :, 6:], letters)
    few = HGRN2(keep=0.0).attend(query[..., :3], key[..., :3], torch.cat([letters, torch.zeros(1, 1, 6, 5)], 2))
    torch.testing.assert_close(few[:, :, 6:9], letters[:, :, :3])
    assert not torch.allclose(few[:, :, 9:], letters[:, :, 3:], atol=0.1)


def test_a_memory_of_constant_size_is_all_that_is_carried():
    q, k, v = torch.randn(3, 2, 2, 11, 4, generator=torch.Generator().manual_seed(2)).double()
    memory, said = torch.zeros(2, 2, 4, 4).double(), []
    for at in range(11):
        gate = (k[:, :, at].float() - 1.5).sigmoid().double() if at else torch.ones(2, 2, 4).double()
        memory = (1 - gate)[..., None] * memory + gate[..., None] * v[:, :, at, None]
        said.append((q[:, :, at].softmax(-1)[:, :, None] @ memory)[:, :, 0])
    z = HGRN2(keep=1.5, block=3).attend(q, k, v)
    torch.testing.assert_close(z, torch.stack(said, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixer", [HGRN2(keep=1.0, block=4), CCA(group=3, window=4, block=8)])
@pytest.mark.parametrize("pos", ["rope", "onehot"])
def test_a_tiny_mixes_by_any_method_of_the_room_and_is_read_as_ever(mixer, pos):
    model = tiny(mixer=mixer.identity(), pos=pos)
    batch = Copying(count=9).make(None, 4, 0)
    with torch.no_grad():
        plain = model(**batch.inputs).logits
        with tap(model, "q", "k", "v", "z") as fast:
            assert torch.equal(model(**batch.inputs).logits, plain)
        with tap(model, "pattern", "z") as slow:
            torch.testing.assert_close(model(**batch.inputs).logits, plain, rtol=1e-4, atol=1e-5)
        with do(model, Zero("L1.H0.z")):
            assert not torch.allclose(model(**batch.inputs).logits, plain, atol=1e-3)
    for layer in ("L0", "L1"):
        q, k, v = (fast[f"{layer}.{kind}"] for kind in "qkv")
        pattern = mixer.pattern(q, k, 16**-0.5)
        torch.testing.assert_close(slow[f"{layer}.pattern"], pattern, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fast[f"{layer}.z"], (pattern @ v).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_the_mixer_is_kept_with_the_model(tmp_path):
    model, batch = tiny(), Copying(count=9).make(None, 3, 0)
    model.save_pretrained(tmp_path)
    again = Tiny.from_pretrained(tmp_path).eval()
    assert again.config.mixer == {"name": "attention.hgrn2"}
    assert torch.equal(again(**batch.inputs).logits, model(**batch.inputs).logits)
    ids, mask = batch.ids[:1, 3:], torch.ones(1, 18, dtype=torch.long)
    mask[:, :3] = 0
    alone = model(input_ids=ids).logits
    padded = model(input_ids=batch.ids[:1], attention_mask=mask, position_ids=torch.arange(18)[None] - 3).logits
    torch.testing.assert_close(padded[:, 3:], alone, rtol=1e-4, atol=1e-5)
    said = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    slow = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(said, slow)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mixer": {"name": "heads.induction"}}, "heads.induction does not mix values; allowed are attention.cca"),
        ({"mixer": {"name": "hgrn3"}}, "no method 'hgrn3'. Did you mean 'attention.hgrn2'"),
        ({"mixer": {"name": "hgrn2", "fields": {"slots": 3}}}, "has no field 'slots'; it has keep, block"),
        ({"causal": False}, "looks back only"),
        ({"attn_implementation": "sdpa"}, "scaled_dot_product_attention"),
    ],
)
def test_a_mixer_that_there_is_not_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        tiny(**options)


def test_every_memory_is_tried_at_every_length():
    conditions = ConstantMemory(counts=(4, 8), slots=(2, 4, 8)).conditions()
    assert len(conditions) == 8 and list(conditions)[0] == "attention, 4 letters"
    last = conditions["8 slots, 8 letters"]
    assert last.model.head_dim == 8 and last.model.mixer and last.model.content == 32
    for name in ("attention, 4 letters", "4 slots, 4 letters"):
        one = conditions[name]
        few = replace(one.training, steps=30, measure_every=15, rows=64)
        losses = train(one.model, one.lesson, few, seed=1).tape.curve("loss")[1]
        assert losses[-1] < losses[0], name
    assert max(max(pair) for pair in ConstantMemory(full=True).sizes) == 128


def test_its_replication_is_found():
    assert replicate.find("constant_memory").row == "s002"
