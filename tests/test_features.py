"""The features room: a contract that every method keeps on every kind of model, readers as such, and lenses."""

import json

import pytest
import torch
from families import ALL, VOCAB
from traces import traces

from headwise.anatomy import anatomy
from headwise.atlas import Atlas
from headwise.features import LogitLens, TunedLens
from headwise.method import catalogue, load
from headwise.reader import FeatureMethod, Reader, ending, states
from headwise.task import Batch, answer_logits

METHODS = [card.name for card in catalogue("features")]
KINDS = ("llama", "gpt2", "opt", "gpt_neox", "gemma2", "qwen3_5", "deepseek_v3", "gptj", "bert", "t5", "vit")
FIELDS = {
    "features.tuned_lens": {"steps": 3, "columns": 6},
    "features.obs_prop": {"plus": (5,), "minus": (6, 7)},
    "features.lib": {"probes": 3},
}
LENSES = ("logit_lens", "tuned_lens")
UNSPLIT = ("deepseek_v3",)


def refusal(method: str, kind: str) -> str | None:
    """A word of the sentence with which this method must refuse this kind of model; None when it must fit."""
    name = method.removeprefix("features.")
    if kind == "vit":
        return "not tokens|unembedding|does not predict" if name != "concept_depth" else None
    if kind in ("bert", "t5") and name in (*LENSES, "obs_prop", "lib"):
        return "does not predict next tokens|is an encoder-decoder"
    if name == "obs_prop" and kind in UNSPLIT:
        return "told apart by head"
    if name == "head_subspaces":
        return {
            "bert": "does not predict next", "t5": "is an encoder-decoder", "gptj": "does not offer [qkv]",
        }.get(kind)  # fmt: skip
    if name == "lm_head_neurons":
        return {"gemma2": "norm behind its MLP", "deepseek_v3": "no single down projection"}.get(kind)
    return None


def make(kind: str, rows: int = 6) -> Batch:
    """Prompts whose last token is one of two, which is also the label."""
    family = ALL[kind]
    if kind == "vit":
        inputs = family.inputs(rows=rows)
        zero = torch.zeros(rows, 1, dtype=torch.long)
        return Batch(inputs, at=zero, answer=torch.arange(rows)[:, None] % 2, about={"task": "test"})
    inputs = family.inputs(rows=rows, length=9)
    ids = inputs["input_ids"]
    ids[:, -1] = 5 + torch.arange(rows) % 2
    at = torch.arange(3, 6 if kind == "t5" else 9).expand(rows, -1).clone()
    return Batch(inputs, at=at, answer=ids[:, -1:].expand(-1, at.shape[1]), foil=None, about={"task": "test"})


@pytest.fixture(scope="module")
def models():
    return {kind: ALL[kind].build() for kind in KINDS}


def alike(one: Reader, two: Reader) -> bool:
    tensors = [(m.weight, two.maps[n].weight) for n, m in one.maps.items()]
    tensors += [(m.bias, two.maps[n].bias) for n, m in one.maps.items()]
    tensors += [(table, two.tables[n]) for n, table in one.tables.items()]
    same = all((a is None and b is None) or torch.equal(a, b) for a, b in tensors)
    sites = {n: m.site for n, m in one.maps.items()} == {n: m.site for n, m in two.maps.items()}
    return same and sites and one.found == two.found and set(one.tables) == set(two.tables)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_contract(name, kind, models, tmp_path):
    model, batch = models[kind], make(kind)
    method = load(name)(**FIELDS.get(name, {}))
    assert isinstance(method, FeatureMethod)
    before = traces(model)
    said = refusal(name, kind)
    if said is not None:
        with pytest.raises(ValueError, match=said):
            method.fit(model, [batch])
        assert traces(model) == before
        return
    reader, again = method.fit(model, [batch]), method.fit(model, [batch])
    assert traces(model) == before
    assert alike(reader, again)
    assert reader.maps or reader.tables
    for table in [t for m in reader.maps.values() for t in (m.weight, m.bias) if t is not None]:
        assert table.isfinite().all()
    assert all(table.isfinite().all() for table in reader.tables.values())
    assert reader.about["method"]["name"] == name and reader.about["fingerprint"]
    reader.save(tmp_path / "reader")
    assert sorted(p.name for p in (tmp_path / "reader").iterdir()) == ["config.json", "reader.safetensors"]
    held = Reader.load(tmp_path / "reader")
    assert alike(reader, held) and held.about == json.loads(json.dumps(reader.about)) and held.name == reader.name
    if reader.maps:
        chosen = list(reader.maps)[:3]
        values = held.read(model, batch, chosen)
        assert list(values) == chosen
        width = VOCAB if reader.ends == "logits" else None
        for value in values.values():
            assert value.shape[:2] == batch.at.shape and value.isfinite().all()
            assert width is None or value.shape[-1] == width
        assert traces(model) == before
    other = ALL[kind].build(seed=1)
    with pytest.raises(ValueError, match="belongs to .* with weights .*; fit it again"):
        held.read(other, batch)


@pytest.mark.parametrize("name", METHODS)
def test_cards_name_their_paper(name):
    card = next(card for card in catalogue("features") if card.name == name)
    assert card.title and card.authors and card.year and card.summary.endswith(".")


# Readers as such


def test_a_reader_lives_in_the_atlas_of_its_model(models, tmp_path):
    model = models["llama"]
    atlas = Atlas.of(model, tmp_path / "llama")
    reader = LogitLens().fit(model, [])
    atlas.add_reader(reader)
    assert atlas.readers() == ["logit_lens"] and alike(atlas.reader("logit_lens"), reader)
    with pytest.raises(ValueError, match="has no reader 'logit_lense'; it has logit_lens. Did you mean 'logit_lens'"):
        atlas.reader("logit_lense")
    with pytest.raises(ValueError, match="The reader logit_lens belongs to weights"):
        atlas.add_reader(LogitLens().fit(models["gpt2"], []))


def test_readers_say_what_is_wrong(models, tmp_path):
    reader = LogitLens().fit(models["llama"], [])
    with pytest.raises(ValueError, match="has no map 'L7'; it has 2, such as L0, L1"):
        reader["L7"]
    with pytest.raises(ValueError, match="'a b' cannot name a reader"):
        Reader("a b", {})
    with pytest.raises(ValueError, match="ends in values or logits, not in 'words'"):
        Reader("a", {}, ends="words")
    with pytest.raises(ValueError, match="not a rung"):
        Reader("a", {}, evidence="guessed")
    with pytest.raises(ValueError, match="has the layers 0 to 1, not 2"):
        LogitLens(layers=(2,)).fit(models["llama"], [])
    with pytest.raises(ValueError, match="no prompts to read activations on"):
        states(models["llama"], [], ["L0.resid_post"])
    with pytest.raises(ValueError, match="is not a headwise reader"):
        Reader.load(tmp_path)
    reader.save(tmp_path / "a")
    config = tmp_path / "a" / "config.json"
    config.write_text(config.read_text().replace("logits", "values"))
    with pytest.raises(ValueError, match="its two files were not written together"):
        Reader.load(tmp_path / "a")


def test_columns_that_do_not_count_are_left_out(models):
    batch = make("llama", 2)
    weighed = Batch(batch.inputs, batch.at, batch.answer, weight=torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]))
    value = states(models["llama"], [weighed], ["L1.resid_post"])["L1.resid_post"]
    whole = states(models["llama"], [batch], ["L1.resid_post"], flat=False)["L1.resid_post"]
    assert torch.equal(value, torch.stack([whole[0, 0], whole[0, 1], whole[1, 0]]))


# Lenses


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("bert", "t5", "vit")])
def test_the_lens_of_the_last_layer_is_the_model(kind, models):
    model, batch = models[kind], make(kind)
    last = f"L{max(anatomy(model).blocks[''])}"
    with torch.no_grad():
        own = answer_logits(model, batch)
    assert torch.allclose(LogitLens().fit(model, []).read(model, batch, [last])[last], own, rtol=1e-4, atol=1e-4)


def test_a_lens_reads_more_columns_than_the_model_has_positions(models):
    model = models["gpt2"]
    values = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), ending(model) as end:
        assert torch.allclose(end(values)[:5], end(values[:5]), atol=1e-5)


def test_the_tuned_lens_begins_as_the_logit_lens_and_comes_nearer(models):
    model, batch = models["llama"], make("llama", 24)
    start = TunedLens(steps=0).fit(model, [batch])
    plain = LogitLens().fit(model, [])
    for name, value in start.read(model, batch).items():
        assert torch.equal(value, plain.read(model, batch)[name])
    tuned = TunedLens(steps=150, lr=1e-2).fit(model, [batch])
    before, after = tuned.found["kl"]["L0"]
    assert before == start.found["kl"]["L0"][0] and after < 0.8 * before
    assert tuned.found["kl"]["L1"][0] == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="trained and tested on 6 columns"):
        TunedLens().fit(model, [make("llama", 1)])
