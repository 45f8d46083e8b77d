"""Plans: the file, what is refused, attaching; and what a KV cache method is as plain data."""

import itertools
import json
import random
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from families import FAMILIES
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

from headwise import planning, quality
from headwise.atlas import Atlas
from headwise.attach import attached, caching, detach
from headwise.bench import cost, dynamic, static
from headwise.cache.duo import Duo
from headwise.cache.preallocated import Preallocated
from headwise.cache.quantised import Quantised
from headwise.kv_cache import KVCache, kv_units
from headwise.models import default_model_path
from headwise.plan import Plan, Trial, as_data, from_data, held_share, kv_values, named_method
from headwise.score import Score


@pytest.fixture(scope="module")
def model():
    return FAMILIES["llama"].build()


def _score(model, kind: str) -> Score:
    from headwise.heads.induction import Induction

    config = model.config
    count = config.num_key_value_heads if kind == "kv" else config.num_attention_heads
    values = {n: torch.arange(count).float() + n for n in range(config.num_hidden_layers)}
    return Score.of_heads(Induction(), model, None, values, kind=kind)


def _plan(model, accepted: bool | None = True) -> Plan:
    plan = Plan.top(model, _score(model, "kv"), 0.5, rest=Duo(2, 4))
    trial = None if accepted is None else Trial(accepted, "It was so.", "a rule", [{"name": "full"}])
    return Plan(**{**vars(plan), "trial": trial})


def _ids(model, length: int = 24) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def test_file_round_trip(model, tmp_path):
    plan = _plan(model)
    plan.save(tmp_path / "p.json")
    again = Plan.load(tmp_path / "p.json")
    assert again.data() == plan.data()
    assert not list(tmp_path.glob("*.part"))
    plan.save_pretrained(tmp_path / "folder")
    assert Plan.from_pretrained(tmp_path / "folder").treatments() == plan.treatments()


def test_top_takes_the_best_share_and_the_best_query_head_of_a_group(model):
    units = kv_units(model)
    plan = _plan(model)
    values = kv_values(model, _score(model, "kv"))
    full = [unit for unit, name in plan.heads.items() if name == "full"]
    assert len(full) == round(len(units) / 2)
    assert min(values[unit] for unit in full) >= max(values[unit] for unit in units if unit not in full)
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    assert kv_values(model, _score(model, "head"))["L0.G0"] == groups - 1


def test_attached_plan_is_used_by_generate_and_leaves_no_trace(model):
    ids, names = _ids(model), {name: value.clone() for name, value in model.state_dict().items()}
    before = model.config._attn_implementation
    own = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    plan = _plan(model)
    plan.attach(model)
    assert attached(model)
    out = model.generate(
        ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None, return_dict_in_generate=True
    )
    assert isinstance(out.past_key_values, KVCache)
    assert out.past_key_values.get_seq_length() == ids.shape[1] + 7
    plan.detach(model)
    assert not attached(model) and model.config._attn_implementation == before
    assert "_prepare_cache_for_generation" not in vars(model)
    again = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(own, again)
    assert all(torch.equal(value, names[name]) for name, value in model.state_dict().items())


def test_rejected_and_untried_plans_need_force(model):
    with pytest.raises(ValueError, match="was rejected: It was so. force=True"):
        _plan(model, False).attach(model)
    with pytest.raises(ValueError, match="never tried"):
        _plan(model, None).attach(model)
    assert not attached(model)
    _plan(model, False).attach(model, force=True)
    with pytest.raises(ValueError, match="attached already"):
        _plan(model).attach(model)
    detach(model)
    with pytest.raises(ValueError, match="No cache plan is attached"):
        detach(model)


def test_plan_of_another_model_is_refused_and_the_model_untouched(model):
    plan = _plan(model)
    other = FAMILIES["llama"].build()
    with torch.no_grad():
        next(iter(other.parameters())).mul_(1.5)
    with pytest.raises(ValueError, match="with weights"):
        plan.attach(other)
    with pytest.raises(ValueError, match=r"2 of them in layer 0; .* 2 layers of 4 KV heads, 4 of them in layer 0"):
        plan.attach(FAMILIES["gpt2"].build())
    fewer = Plan(**{**vars(plan), "layout": {**plan.layout, "1": 1}})
    with pytest.raises(ValueError, match=r"1 of them in layer 1; .* 2 of them in layer 1\.$"):
        fewer.attach(model)
    assert not attached(model)
    assert not attached(other)


def test_bad_files(model, tmp_path):
    with pytest.raises(ValueError, match="There is no plan"):
        Plan.load(tmp_path / "none.json")
    good = _plan(model).data()
    cases = {
        "torn": json.dumps(good)[:200],
        "format": json.dumps({**good, "format": "headwise.plan/99"}),
        "method": json.dumps({**good, "legend": {"full": {"method": "cache.nothing", "fields": {}}}}),
        "room": json.dumps({**good, "legend": {"full": {"method": "heads.induction", "fields": {}}}}),
        "field": json.dumps({**good, "legend": {"full": {"method": "cache.duo", "fields": {"size": 1}}}}),
        "treatment": json.dumps({**good, "heads": {"L0.G0": {"treatment": "gone", "scores": {}}}}),
    }
    for name, text in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="is not a headwise plan"):
            Plan.load(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="There is no plan"):
        Plan.from_pretrained(tmp_path / "folder")


def test_a_plan_goes_to_the_hub_and_comes_back(model, tmp_path, monkeypatch):
    made = {}

    class Hub:
        def create_repo(self, name, *, private, exist_ok):
            made[name] = (private, exist_ok)
            return f"https://hub/{name}"

        def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id):
            assert repo_id in made
            (tmp_path / path_in_repo).write_bytes(path_or_fileobj)

    def none(*_):
        raise OSError("no such repository\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(tmp_path / file))
    plan = _plan(model)
    assert plan.push_to_hub("me/plan", private=True) == "https://hub/me/plan" and made == {"me/plan": (True, True)}
    again = Plan.from_pretrained("me/plan")
    assert again.data() == plan.data()
    again.attach(model)
    again.detach(model)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", none)
    with pytest.raises(ValueError, match="and the hub gives none: no such repository$"):
        Plan.from_pretrained("me/other")


def test_heads_that_do_not_exist(model):
    with pytest.raises(ValueError, match=r"L0\.G99 is no KV head .* Did you mean"):
        Plan.of(model, {"full": Preallocated(), "stream": Duo()}, {"L0.G99": "stream"})
    plan, name = _plan(model), model.config._attn_implementation
    strange = Plan(**{**vars(plan), "heads": {**plan.heads, "L0.G99": "full"}})
    for use in (strange.check, strange.attach, strange.new_cache):
        with pytest.raises(ValueError, match=r"L0\.G99 is no KV head .* Did you mean"):
            use(model)
    assert not attached(model) and model.config._attn_implementation == name
    with pytest.raises(ValueError, match="the legend of this plan has full"):
        Plan.of(model, {"full": Preallocated()}, {"L0.G0": "stream"})
    with pytest.raises(ValueError, match="allowed is 0 to 1"):
        Plan.top(model, _score(model, "kv"), 1.5)


def test_methods_as_data():
    assert from_data(as_data(Duo(3, 5))) == Duo(3, 5)
    assert named_method("duo:sink=3,recent=5") == Duo(3, 5)
    for text, words in (("duo:sink", "name=value"), ("duo:sink=many", "no number"), ("duo:size=3", "no field")):
        with pytest.raises(ValueError, match=words):
            named_method(text)


def test_bytes_are_measured_not_claimed(model):
    assert held_share(Preallocated(), 1000) == pytest.approx(1)
    assert held_share(Duo(8, 24), 1000) == pytest.approx(0.032)
    plan = _plan(model)
    ids = _ids(model, 60)
    with caching(model), torch.no_grad():
        cache = plan.new_cache(model, reserve=60)
        model(input_ids=ids, past_key_values=cache)
        own = DynamicCache(config=model.config)
        model(input_ids=ids, past_key_values=own)
    size = sum(one.keys.nbytes + one.values.nbytes for one in own.layers)
    assert cache.bytes() / size == pytest.approx(plan.share_of_bytes(60), rel=1e-6)


def test_cost_measures_all_contestants_on_the_same_prompt(model):
    ids = _ids(model, 40)
    units = kv_units(model)
    caches = {
        "dynamic": dynamic(model),
        "static": static(model, 60),
        "duo": lambda: KVCache(model, dict.fromkeys(units, Duo(2, 6))),
    }
    block = MagicMock()
    found = {
        one.name: one for one in cost(model, caches, ids, tokens=2, rounds=3, prefills=2, inside={"duo": lambda: block})
    }
    assert list(found) == list(caches) and block.__enter__.call_count == block.__exit__.call_count == 2 + 3
    assert all(len(one.decodes) == 3 and len(one.prefills) == 2 and one.decode > 0 for one in found.values())
    assert found["duo"].bytes < found["dynamic"].bytes < found["static"].bytes
    with pytest.raises(ValueError, match="1 or more of each"):
        cost(model, {}, ids)


def test_a_method_inside_another_from_words():
    assert named_method("quantised:bits=4,of=(duo:sink=3,recent=5)") == Quantised(4, Duo(3, 5))


@pytest.fixture(scope="module")
def chatty():
    """A small model with the words of the default one, so that every task of a trial can be made for it."""
    tokenizer = AutoTokenizer.from_pretrained(default_model_path())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def test_rankings_are_fused_by_their_reciprocal_ranks(chatty):
    """Against exact fractions; equal values share their mean rank, and it does not matter what is named first."""
    model, _ = chatty
    units = kv_units(model)
    assert len(units) == 4
    scores = {
        "need": dict(zip(units, (0.0, 9.0, 1.0, 2.0), strict=True)),
        "duo_gate": dict(zip(units, (1.0, 0.5, 1.0, 0.0), strict=True)),
        "reach": dict(zip(units, (0.4, 0.1, 0.3, 0.2), strict=True)),
    }
    ranks = {"need": (4, 1, 3, 2), "duo_gate": (Fraction(3, 2), 3, Fraction(3, 2), 4), "reach": (1, 4, 2, 3)}
    for names in itertools.permutations(scores):
        for count in (2, 3):
            chosen = names[:count]
            worth = [sum(1 / (planning.SMOOTH + Fraction(ranks[name][i])) for name in chosen) for i in range(4)]
            orders = planning.orders(model, {name: scores[name] for name in chosen})
            assert orders[" + ".join(chosen)] == [units[i] for i in sorted(range(4), key=lambda i: -worth[i])]
    assert planning.orders(model, {"need": scores["need"]}) == {"need": [units[i] for i in (1, 3, 2, 0)]}


def test_what_one_ranking_alone_puts_first_is_kept_and_its_noise_is_not(chatty, monkeypatch):
    """One score knows all heads, the other but one. Sums of ranks put this one up to 24th, the first five to 50th."""
    model, _ = chatty
    units = [f"L{i}.G0" for i in range(90)]
    monkeypatch.setattr(planning, "kv_units", lambda _: units)
    for seed in range(20):
        noise = random.Random(seed)
        known = {unit: float(90 - i) for i, unit in enumerate(units)}
        single = {unit: noise.random() for unit in units} | {units[60]: 5.0}
        fused = planning.orders(model, {"reach": known, "need": single})["reach + need"]
        assert units[60] in fused[:10]
        assert set(units[:5]) <= set(fused[:20])


def test_treatments_of_the_rest_are_tried_for_the_best_ranking_only(chatty, monkeypatch):
    model, tokenizer = chatty
    units, first, second = kv_units(model), Duo(4, 16), Duo(4, 16, whole=True)
    scores = {
        name: {u: -abs(i - k) for i, u in enumerate(units)} for k, name in enumerate(("need", "duo_gate", "echo"))
    }
    orders = planning.orders(model, scores)
    assert list(orders) == ["need + duo_gate + echo", "need", "duo_gate", "echo"]
    assert orders["need"] == units and orders["duo_gate"] == [units[i] for i in (1, 0, 2, 3)]
    worth = {("duo_gate", first): 0.5, ("echo", first): 0.9, ("need", second): 1.0, ("echo", second): 0.7}

    def examine(_model, _tokenizer, _making, choice, exam, *_):
        lost = 1 - Fraction(worth.get((choice.ranking, choice.rest), 0.0))
        choice.lost += [lost / len(exam)] * len(exam)

    monkeypatch.setattr(planning, "_examine", examine)
    making = planning.Making(test_at=256, rest=(first, second))
    best, tried = planning._choose(model, tokenizer, making, orders, {first: 2, second: 1})
    assert (best.ranking, best.rest, best.full) == ("echo", first, orders["echo"][:2])
    assert [(one.ranking, one.rest) for one in tried] == [*((name, first) for name in orders), ("echo", second)]
    assert tried[-1].full == orders["echo"][:1]


@dataclass(frozen=True)
class Asked:
    """In place of a batch: a name and the numbers of its prompts."""

    task: str
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: list[int]) -> "Asked":
        return Asked(self.task, tuple(self.rows[row] for row in rows))


@pytest.mark.parametrize("seed", range(40))
def test_choices_that_cannot_win_are_stopped_and_no_other_wins(chatty, monkeypatch, seed):
    """Against trying all on everything; of one task there are fewer prompts, and many choices are equal."""
    model, tokenizer = chatty
    draw, units = random.Random(seed), kv_units(model)
    orders = {name: draw.sample(units, len(units)) for name in "abcdef"}
    rest = (Duo(4, 16), Duo(4, 16, whole=True))
    prompts = {task: Asked(task, tuple(range(3 if task == "keys" else 6))) for task in quality.RETRIEVAL}
    worth: dict[tuple, list[bool]] = {}
    asked, steps = [], []

    def tokens(cache: tuple, task: str, row: int) -> list[bool]:
        return worth.setdefault((*cache, task, row), [draw.random() < 0.85 for _ in range(4)])

    def retrieval(model, tokenizer, prompt, cache, forced, step):
        (row,) = prompt.rows
        asked.append((*cache, prompt.task, row))
        step()
        return SimpleNamespace(tokens=torch.tensor([tokens(cache, prompt.task, row)]))

    class Bar:
        """What a progress bar is told."""

        def __init__(self, total, **_):
            self.total = total

        def __enter__(self):
            return self

        def __exit__(self, *_):
            assert sum(steps) == self.total == 7 * 15

        def update(self, n):
            steps.append(n)

    monkeypatch.setattr(planning, "tqdm", Bar)
    monkeypatch.setattr(planning, "retrieval", retrieval)
    monkeypatch.setattr(planning, "_maker", lambda model, rest, *_: (frozenset(rest), *set(rest.values())))
    monkeypatch.setattr(quality, "prompts", lambda *_, **__: prompts)
    best, tried = planning._choose(model, tokenizer, planning.Making(rest=rest), orders, dict.fromkeys(rest, 1))
    assert len(asked) == sum(len(one.lost) for one in tried) < 7 * 15
    # What was not asked can be anything: none of it would have made another win.
    every = [(frozenset(set(units) - set(one.full)), one.rest) for one in tried]
    exact = []
    for cache in every:
        shares = []
        for task in quality.RETRIEVAL:
            said = [one for row in range(min(4, len(prompts[task]))) for one in tokens(cache, task, row)]
            shares.append(Fraction(sum(said), len(said)))
        exact.append(sum(shares) / 4)
    assert best is tried[exact.index(max(exact))] and best.right == max(exact) and len(best.lost) == 15
    assert all(one.right >= right for one, right in zip(tried, exact, strict=True))


def test_a_plan_is_made_tried_and_refused_where_nothing_can_be_told(chatty, monkeypatch, tmp_path):
    model, tokenizer = chatty
    cheap = {
        "duo_gate": ({"steps": 2}, "passkeys", {"length": 120, "passkeys": 1, "asked": 1}, 2),
        "retrieval": ({}, "needle", {"length": 120}, 2),
    }
    monkeypatch.setattr(planning, "RANKINGS", cheap)
    fewer = {name: (task, 2, many, fields) for name, (task, _, many, fields) in quality.TASKS.items()}
    monkeypatch.setattr(quality, "TASKS", fewer)
    rest = (Duo(4, 16), Duo(4, 16, whole=True))
    making = planning.Making(bytes=0.6, at=1024, test_at=256, rest=rest, rankings=("duo_gate", "retrieval"))
    atlas = Atlas.of(model, tmp_path / "atlas", tokenizer)
    plan = planning.make_plan(model, tokenizer, making, atlas)
    assert plan.count() == {"rest": 2, "full": 2}
    assert plan.share_of_bytes(1024) <= 0.6
    ranked = sorted(plan.evidence, key=lambda unit: -plan.evidence[unit]["duo_gate"])
    assert {unit for unit, name in plan.heads.items() if name == "full"} == set(ranked[:2])
    assert list(plan.about["skipped"]) == ["retrieval"]
    assert plan.about["ranking"] == "duo_gate" and len(plan.about["dev"]) == 2
    rows = {row["name"]: row for row in plan.trial.rows}
    assert list(rows) == ["full", "plan", "random 1", "random 2", "streaming"]
    assert rows["plan"]["bytes"] == rows["random 1"]["bytes"] < rows["full"]["bytes"]
    assert not plan.trial.accepted and "gets nothing right" in plan.trial.says
    with pytest.raises(ValueError, match="was rejected"):
        plan.attach(model)
    # What was scored once is not scored again.
    monkeypatch.setattr(planning.load("heads.duo_gate"), "score", lambda *_: pytest.fail("scored again"))
    again = planning.make_plan(model, tokenizer, making, atlas)
    assert again.heads == plan.heads and again.trial == plan.trial


def test_fewer_bytes_than_the_window_takes(chatty):
    model, tokenizer = chatty
    with pytest.raises(ValueError, match="is less than cache.duo takes"):
        planning.make_plan(model, tokenizer, planning.Making(bytes=0.1, at=512))
    with pytest.raises(ValueError, match="there are no more"):
        planning.Making(bytes=1.5)
    with pytest.raises(ValueError, match="There is no ranking 'gates'"):
        planning.Making(rankings=("gates",))
    with pytest.raises(ValueError, match="No ranking was named"):
        planning.Making(rankings=())
