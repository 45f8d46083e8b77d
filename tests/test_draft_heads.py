"""Draft heads: what they guess, how they learn, that they keep to their model, and that drafting changes no text."""

import json

import pytest
import torch
from chances import START, flatter, p_value, too_willing
from families import FAMILIES, VOCAB
from test_docs import keys
from typer.testing import CliRunner

from headwise import accepting, draft_training
from headwise.cli import app
from headwise.decode import Chimera, Clover, Hydra, HydraPlus, Medusa
from headwise.draft_heads import TAIL, DraftHeads
from headwise.draft_training import self_written, states_after, texts_in, train
from headwise.drafting import News
from headwise.models import fingerprint, open_model
from headwise.verifying import Verifying

TREE = (2, 2, 1)
METHODS = {
    "medusa": Medusa(tree=TREE),
    "hydra": Hydra(tree=TREE),
    "hydra_plus": HydraPlus(tree=TREE, layers=2, reach=8),
    "clover": Clover(tree=TREE, reach=8),
    "chimera": Chimera(tree=TREE, reach=8),
}


@pytest.fixture(scope="module")
def model():
    return FAMILIES["llama"].build()


@pytest.fixture(scope="module")
def lesson(model):
    # What it will be asked for is among the texts: a random model writes nothing that could be learned in general.
    more = torch.randint(3, VOCAB, (21, 10), generator=torch.Generator().manual_seed(0))
    ids = self_written(model, torch.cat([FAMILIES["llama"].inputs()["input_ids"], more]), new=24, temperature=0.0)
    return states_after(model, ids), ids


@pytest.fixture(scope="module")
def trained(model, lesson):
    found = {}
    for name, method in METHODS.items():
        torch.manual_seed(0)
        heads = method.untrained(model)
        losses = train(heads, *lesson, steps=80, rate=1e-2)
        found[name] = (heads, losses)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_training_lowers_the_loss_and_leaves_the_model(name, trained, model):
    heads, losses = trained[name]
    assert sum(losses[-10:]) / 10 < 0.85 * sum(losses[:3]) / 3
    assert fingerprint(model) == fingerprint(FAMILIES["llama"].build())
    assert all(p.grad is None for p in model.parameters())
    # Medusa has no parameter that is not its own.
    inside = {id(p) for p in heads.parameters()}
    assert not inside & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_saved_heads_guess_the_same(name, trained, model, lesson, tmp_path):
    heads, _ = trained[name]
    heads.save_pretrained(tmp_path)
    again = DraftHeads.from_pretrained(tmp_path, model)
    assert again.method == heads.method
    for one, other in zip(heads.guesses(*lesson), again.guesses(*lesson), strict=True):
        assert torch.equal(one, other)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "heads.safetensors"]
    assert list(json.loads((tmp_path / "config.json").read_text())) == keys("Draft heads on disk")


@pytest.mark.parametrize("name", METHODS)
def test_what_is_guessed_while_drafting_is_what_was_trained(name, trained, lesson):
    """One row of states up to column t gives the guesses that training makes at column t, branch by branch."""
    heads, _ = trained[name]
    states, ids = lesson[0][:3, :8], lesson[1][:3, :8]
    with torch.no_grad():
        whole = heads.guesses(states, ids)
        place = whole[0].shape[1] - 1
        t = place + TAIL - 1
        context = heads.context(states[:, : t + 1], torch.ones(3, t + 1, dtype=torch.bool))
        for i in range(1, heads.count + 1):
            tokens = heads.embed(ids[:, t - TAIL + 1 : t + 1 + i])[:, None]
            guess = heads.guess(i, context, tokens)[:, 0]
            torch.testing.assert_close(guess, whole[i - 1][:, place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["hydra_plus", "clover", "chimera"])
def test_padding_of_short_rows_changes_no_guess(name, trained, lesson):
    heads, _ = trained[name]
    states, ids = lesson[0][:2, :6], lesson[1][:2, :7]
    wide = torch.nn.functional.pad(states, (0, 0, 2, 0), value=7.0)
    real = torch.tensor([[False] * 2 + [True] * 6] * 2)
    tokens = heads.embed(ids[:, -3:])[:, None]
    with torch.no_grad():
        alone = heads.guess(1, heads.context(states, real[:, 2:]), tokens)
        padded = heads.guess(1, heads.context(wide, real), tokens)
    torch.testing.assert_close(alone, padded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rows", [1, 3])
def test_drafting_is_lossless_and_accepts_something(name, rows, trained, model):
    inputs = FAMILIES["llama"].inputs(rows=rows)
    if rows > 1:  # ragged rows, the first of which stands in the lesson
        inputs = FAMILIES["llama"].inputs(rows=rows, padded=True)
    options = {"max_new_tokens": 24, "do_sample": False}
    plain = model.generate(**inputs, **options)
    heads, _ = trained[name]
    loop = Verifying(heads.method.drafting(heads))
    said = model.generate(**inputs, custom_generate=loop, **options)
    assert torch.equal(said, plain)
    assert loop.stats.accepted > 0 and loop.stats.per_pass > 1.05
    assert set(loop.stats.sources) == {type(heads.method).__name__}


@pytest.mark.parametrize("name", METHODS)
def test_sampling_with_trained_heads_keeps_the_distribution_of_the_model(name, monkeypatch):
    model = flatter(FAMILIES["llama"].build())
    torch.manual_seed(0)
    # Sampled as it will be asked, so that the heads have seen what follows the prompt.
    ids = model.generate(START.repeat(48, 1), max_new_tokens=12, do_sample=True, top_k=3, eos_token_id=None)
    heads = METHODS[name].untrained(model)
    train(heads, states_after(model, ids), ids, steps=60, rate=1e-2)

    def found(times):
        return p_value(model, lambda _: heads.method.drafting(heads), times=times)

    assert found(8) > 1e-3
    monkeypatch.setattr(accepting, "pick", too_willing)
    assert found(4) < 1e-6


@pytest.mark.parametrize("tree", [(1, 1, 1), (4,), (3, 2, 2)])
def test_trees_and_chains(tree, model):
    heads = Hydra(tree=tree).untrained(model)
    drafter = heads.method.drafting(heads)
    drafter.begin(model, [[5, 6, 7], [8]], False)
    drafter.accept({0: News([9], torch.randn(3, 32)), 1: News([3], torch.randn(1, 32))})
    drafts = drafter.propose({0: 9, 1: 2})
    sizes = {(1, 1, 1): 3, (4,): 4, (3, 2, 2): 3 + 6 + 12}
    for draft in drafts.values():
        draft.check(VOCAB)
        assert len(draft.tokens) == sizes[tree]
        assert (draft.parents is None) == (tree == (1, 1, 1))


def test_the_same_draft_for_any_number_of_rows(trained, model):
    heads, _ = trained["clover"]
    drafter = heads.method.drafting(heads)
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    drafter.begin(model, [[5, 6, 7]], False)
    drafter.accept({0: News([9], states)})
    alone = drafter.propose({0: 9})[0]
    drafter.begin(model, [[5, 6, 7], [1, 2, 3, 4]], False)
    drafter.accept({0: News([9], states), 1: News([9], torch.randn(8, 32))})
    assert drafter.propose({0: 9, 1: 9})[0].tokens == alone.tokens


def test_hydra_tells_branches_apart_and_medusa_does_not(trained, model):
    start, tokens = torch.randn(1, 32), torch.randn(1, 2, TAIL + 2, 32)
    for name, same in (("medusa", True), ("hydra", False), ("clover", False)):
        heads, _ = trained[name]
        first, second = heads.guess(2, start, tokens)[0]
        assert torch.allclose(first, second) == same


def test_blocks_have_weights_of_their_own(model):
    heads = Medusa(layers=2).untrained(model)
    weights = [p.data_ptr() for p in heads.parameters()]
    assert len(weights) == len(set(weights)) == 2 * 2 * 4


def test_a_killed_training_goes_on_as_if_nothing_had_been(model, lesson, tmp_path, monkeypatch):
    def fresh():
        torch.manual_seed(1)
        return Hydra(tree=TREE).untrained(model)

    whole = fresh()
    losses = train(whole, *lesson, steps=12)
    killed, calls = fresh(), []

    def loss(*args):
        calls.append(1)
        if len(calls) > 8:
            raise KeyboardInterrupt
        return DraftHeads.loss(killed, *args)

    killed.loss = loss
    with pytest.raises(KeyboardInterrupt):
        train(killed, *lesson, steps=12, folder=tmp_path, every=5)
    again = fresh()
    assert train(again, *lesson, steps=12, folder=tmp_path, every=5) == losses
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="holds another run: its rate is 0.001, not 0.1"):
        train(fresh(), *lesson, steps=12, rate=0.1, folder=tmp_path)


def test_bad_input_is_a_sentence(model, lesson, trained, tmp_path):
    with pytest.raises(ValueError, match="Hydra needs heads trained for this model"):
        Hydra().drafter(model)
    with pytest.raises(ValueError, match="holds no draft heads"):
        Hydra(path=str(tmp_path)).drafter(model)
    with pytest.raises(ValueError, match=r"tree is \(\)"):
        Hydra(tree=())
    with pytest.raises(ValueError, match="Texts of 5 tokens teach 3 heads nothing"):
        trained["hydra"][0].loss(lesson[0][:, :5], lesson[1][:, :5])
    with pytest.raises(ValueError, match="0 steps of 8 of 24 texts"):
        train(trained["hydra"][0], *lesson, steps=0)
    heads, _ = trained["medusa"]
    heads.save_pretrained(tmp_path)
    other = FAMILIES["llama"].build(seed=1)
    with pytest.raises(ValueError, match="were trained with other weights"):
        Medusa(path=str(tmp_path)).drafter(other)
    for name, words in (("vocabulary", "a vocabulary of 99"), ("width", "a width of 99")):
        facts = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(facts | {name: 99}))
        with pytest.raises(ValueError, match=f"guess for {words}, and this model has one of"):
            DraftHeads.from_pretrained(tmp_path, model)
        (tmp_path / "config.json").write_text(json.dumps(facts))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="was written by something else"):
        DraftHeads.from_pretrained(tmp_path, model)


def test_texts_are_kept_batch_by_batch(model, tmp_path, monkeypatch):
    prompts = torch.randint(3, VOCAB, (7, 4), generator=torch.Generator().manual_seed(0))
    whole = self_written(model, prompts, 6, temperature=1.0, rows=2)
    calls = []

    def stops(*args, **options):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return self_written(*args, **options)

    monkeypatch.setattr(draft_training, "self_written", stops)
    with pytest.raises(KeyboardInterrupt):
        texts_in(tmp_path, model, prompts, 6, temperature=1.0, rows=2)
    monkeypatch.undo()
    assert torch.equal(texts_in(tmp_path, model, prompts, 6, temperature=1.0, rows=2), whole)
    assert torch.equal(texts_in(tmp_path, model, prompts, 6, temperature=1.0, rows=2), whole)
    with pytest.raises(ValueError, match="holds texts of another run"):
        texts_in(tmp_path, model, prompts, 6, temperature=0.5, rows=2)


# On the command line.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    text = "the value of a name is an object and it is not in the name "
    words = {word: place for place, word in enumerate(["<s>", "<unk>", *sorted(set(text.split()))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    fields = FAMILIES["llama"].fields | {"vocab_size": len(words), "bos_token_id": 0}
    made = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(**fields)).save_pretrained(made)
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", pad_token="<s>").save_pretrained(made)
    (made / "text.txt").write_text(text * 40)
    return made


def test_heads_are_trained_and_used_from_the_command_line(folder, tmp_path):
    out = str(tmp_path / "heads")
    asked = ["draft", "train", str(folder), "--method", "clover", "--data", str(folder / "text.txt"), "--out", out]
    asked += ["--texts", "6", "--prompt", "6", "--tokens", "10", "--steps", "4", "--json"]
    first = CliRunner().invoke(app, asked)
    assert first.exit_code == 0, first.output
    facts = json.loads(first.stdout)
    assert list(facts) == keys("headwise draft train --json")
    assert facts["method"] == "clover" and len(facts["losses"]) == 4 and len(facts["right"]) == 4
    again = json.loads(CliRunner().invoke(app, asked).stdout)
    assert again == facts, "a finished run is not made again"
    shown = CliRunner().invoke(app, asked[:-1])
    assert shown.exit_code == 0 and "tokens ahead" in shown.stdout
    # What it says last can be typed.
    use = next(line for line in shown.stdout.splitlines() if line.startswith("Use them: headwise "))
    used = CliRunner().invoke(
        app,
        ["generate", str(folder), "--draft", f"clover:path={out}", "--prompt", "the value", "--tokens", "4", "--json"],
    )
    assert "--draft clover:path=" in use and used.exit_code == 0, used.output
    assert json.loads(used.stdout)["drafted"] > 0
    model, _ = open_model(folder)
    ids = torch.tensor([[0, 2, 3, 4]])
    done = Clover(path=out).generate(model, ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(done.ids, model.generate(ids, max_new_tokens=8, do_sample=False))


def test_the_command_line_refuses_with_a_sentence(folder):
    said = CliRunner().invoke(app, ["draft", "train", str(folder), "--method", "copyspec"])
    assert said.exit_code == 2 and "copyspec has no draft heads; allowed are medusa" in said.stderr


def test_no_heads_is_a_sentence(model):
    with pytest.raises(ValueError, match="0 heads were asked for"):
        DraftHeads(Hydra(), model, 0)
