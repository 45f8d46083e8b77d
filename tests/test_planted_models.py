"""Planted models do their tasks, and each planted head matters exactly as its role says."""

import pytest
import torch

from headwise.data.induction import Induction
from headwise.data.ioi import IOI
from headwise.data.needle import Needle
from headwise.data.planted import PARTS, Planted
from headwise.data.repeated_tokens import RepeatedTokens
from headwise.data.successor import Successor
from headwise.task import answer_logits, correct, logprob

TASKS = {
    "induction": Induction(),
    "one pair": Induction(length=24, pairs=1, segment=1),
    "repeated": RepeatedTokens(length=30),
    "needle": Needle(length=120),
    "ioi": IOI(),
    "successor": Successor(),
    "bare successor": Successor(between=""),
}
SIZES = [
    Planted(),
    Planted(layers=3, heads=8, kv_heads=8, plain=40),
    Planted(layers=6, heads=6, kv_heads=3, d_head=80),
    Planted(decoys=("mute", "twin"), layers=5),
]


def place(unit):
    layer, head = unit[1:].split(".H")
    return int(layer), int(head)


def heads_at(model, units, change):
    """Plain hooks on o_proj that change the outputs z of the given heads; returns their handles."""

    def hook_of(head):
        def hook(module, args):
            z = args[0].clone()
            size = model.config.head_dim
            part = slice(head * size, (head + 1) * size)
            z[..., part] = change(module, part, z[..., part])
            return (z,)

        return hook

    layers = model.model.layers
    return [layers[n].self_attn.o_proj.register_forward_pre_hook(hook_of(h)) for n, h in map(place, units)]


@torch.no_grad()
def without(planted, batch, *units):
    handles = heads_at(planted.model, units, lambda module, part, z: torch.zeros_like(z))
    try:
        return logprob(answer_logits(planted.model, batch), batch).mean().item()
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def restored(planted, batch, unit):
    kept = {}

    def keep(module, part, z):
        kept["z"] = z.clone()
        return z

    for change, inputs in ((keep, batch.inputs), (lambda module, part, z: kept["z"], batch.corrupt)):
        handles = heads_at(planted.model, [unit], change)
        try:
            out = answer_logits(planted.model, batch, inputs)
        finally:
            for handle in handles:
                handle.remove()
    return logprob(out, batch).mean().item()


def unit_of(planted, part):
    return next(unit for unit, role in planted.truth.items() if role == part)


@pytest.mark.parametrize("recipe", SIZES, ids=range(len(SIZES)))
@pytest.mark.parametrize("seed", range(2))
def test_without_noise_every_task_is_done(recipe, seed):
    planted = recipe.build(seed)
    for name, task in TASKS.items():
        batch = task.make(planted.tokenizer, 6, seed)
        with torch.no_grad():
            out = answer_logits(planted.model, batch)
        assert (out.argmax(-1) == batch.answer).all(), name
        assert logprob(out, batch).min() > -1e-3, name
        assert (batch.ids != planted.tokenizer.unk_token_id).all(), name


@pytest.fixture(scope="module")
def planted():
    return Planted().build(5)


@pytest.mark.parametrize(
    ("part", "task"),
    [
        ("previous token", "induction"),
        ("induction", "induction"),
        ("retrieval", "needle"),
        ("name mover", "ioi"),
        ("duplicate token", "ioi"),
        ("successor", "successor"),
    ],
)
def test_each_head_is_needed_and_enough_for_its_task(planted, part, task):
    batch = TASKS[task].make(planted.tokenizer, 12, 1)
    unit = unit_of(planted, part)
    assert without(planted, batch, unit) < -0.5
    with torch.no_grad():
        lost = logprob(answer_logits(planted.model, batch, batch.corrupt), batch).mean().item()
    assert lost < -0.5
    assert restored(planted, batch, unit) > -1e-2


@pytest.mark.parametrize(("part", "task"), [("previous token", "needle"), ("subject inhibition", "ioi")])
def test_heads_in_the_middle_are_needed(planted, part, task):
    batch = TASKS[task].make(planted.tokenizer, 12, 1)
    assert without(planted, batch, unit_of(planted, part)) < -0.5


@pytest.mark.parametrize("task", TASKS)
def test_heads_of_other_tasks_do_not_matter(planted, task):
    parts = {
        "induction": ("previous token", "induction"),
        "one pair": ("previous token", "induction"),
        "repeated": ("previous token", "induction", "duplicate token"),
        "needle": ("previous token", "retrieval"),
        "ioi": ("duplicate token", "subject inhibition", "name mover"),
        "successor": ("successor",),
        "bare successor": ("successor",),
    }
    batch = TASKS[task].make(planted.tokenizer, 6, 2)
    spare = [unit for unit, part in planted.truth.items() if part not in parts[task]] + list(planted.decoys)
    assert without(planted, batch, *spare) > -1e-3


def test_current_token_head_says_its_own_token_faintly(planted):
    batch = Induction().make(planted.tokenizer, 6, 3)
    unit = unit_of(planted, "current token")
    here = torch.arange(5, 20)
    with torch.no_grad():
        with_it = planted.model(**batch.inputs).logits
        handles = heads_at(planted.model, [unit], lambda module, part, z: torch.zeros_like(z))
        bare = planted.model(**batch.inputs).logits
        handles[0].remove()
    gain = (with_it - bare)[:, here].gather(-1, batch.ids[:, here, None])
    assert (gain > 2).all()


def patterns(planted, batch):
    with torch.no_grad():
        planted.model.set_attn_implementation("eager")
        found = planted.model(**batch.inputs, output_attentions=True).attentions
        planted.model.set_attn_implementation("sdpa")
    return {unit: found[place(unit)[0]][:, place(unit)[1]] for unit in {**planted.truth, **planted.decoys}}


def test_attention_is_where_the_role_says(planted):
    batch = RepeatedTokens(length=30).make(planted.tokenizer, 4, 1)
    seen = patterns(planted, batch)
    later = torch.arange(32, 60)
    offsets = {"previous token": 1, "induction": 29, "duplicate token": 30, "current token": 0}
    for part, back in offsets.items():
        assert (seen[unit_of(planted, part)][:, later, later - back] > 0.99).all(), part
    mute = next(iter(planted.decoys))
    assert torch.allclose(seen[mute], seen[unit_of(planted, "induction")], atol=1e-3)


def test_the_mute_decoy_writes_as_much_but_nothing_useful(planted):
    batch = Induction().make(planted.tokenizer, 8, 1)
    mute, real = next(iter(planted.decoys)), unit_of(planted, "induction")
    norms = {}
    for unit in (mute, real):
        layer, head = place(unit)
        size = planted.model.config.head_dim
        norms[unit] = (
            planted.model.model.layers[layer].self_attn.o_proj.weight[:, head * size : (head + 1) * size].norm()
        )
    assert torch.allclose(norms[mute], norms[real])
    assert without(planted, batch, mute) > -1e-3
    assert without(planted, batch, real) < -1
    assert restored(planted, batch, mute) < -1


def test_either_twin_may_go_but_not_both():
    planted = Planted(decoys=("twin",)).build(3)
    one, two = planted.decoys
    assert set(planted.decoys.values()) == {"twin"} and "induction" not in planted.truth.values()
    batch = Induction().make(planted.tokenizer, 8, 1)
    assert without(planted, batch, one) > -1e-3
    assert without(planted, batch, two) > -1e-3
    assert without(planted, batch, one, two) < -1


def test_generate_copies_the_whole_code(planted):
    batch = Needle(length=150).make(planted.tokenizer, 4, 0)
    said = planted.model.generate(**batch.inputs, max_new_tokens=5, do_sample=False)[:, -5:]
    low = batch.spans["needle"][:, :1]
    assert torch.equal(said, batch.ids.gather(1, low + torch.arange(5)))


def test_left_padding_changes_nothing(planted):
    batch = IOI().make(planted.tokenizer, 12, 4)
    assert batch.inputs["attention_mask"].min() == 0
    with torch.no_grad():
        assert correct(answer_logits(planted.model, batch), batch).all()


def test_seeds_move_heads_and_noise_moves_weights():
    places = {tuple(Planted().build(seed).truth) for seed in range(3)}
    assert len(places) == 3
    one, same, noisy = (Planted(noise=noise).build(0) for noise in (0.0, 0.0, 0.03))
    for a, b in zip(one.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert one.truth == noisy.truth
    projection = noisy.model.model.layers[0].self_attn.q_proj.weight
    assert (projection != 0).float().mean() > 0.99
    batch = Induction().make(noisy.tokenizer, 16, 1)
    with torch.no_grad():
        assert correct(answer_logits(noisy.model, batch), batch).mean() > 0.9


def test_parts_bring_what_they_are_built_on():
    planted = Planted(parts=("name mover",), decoys=(), layers=3, heads=2, kv_heads=2).build(0)
    assert set(planted.truth.values()) == {"duplicate token", "subject inhibition", "name mover"}
    assert Planted(parts=PARTS, decoys=()).build(0).decoys == {}


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        (Planted(parts=("telepathy",)), "'telepathy' is no part of a planted model; allowed are previous token"),
        (Planted(decoys=("ghost",)), "'ghost' is no decoy"),
        (Planted(d_head=32), "Heads of width 32"),
        (Planted(heads=6, kv_heads=4), "6 heads cannot share 4 KV heads"),
        (Planted(layers=2), "do not fit in 2 layers"),
    ],
    ids=str,
)
def test_impossible_recipes_are_answered_in_a_sentence(recipe, sentence):
    with pytest.raises(ValueError, match=sentence):
        recipe.build(0)
