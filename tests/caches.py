"""The methods of the cache room with fields for short prompts, and the ways in which users call `generate`."""

from dataclasses import replace

import kv_twins
import torch
from families import FAMILIES, VOCAB
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from headwise.anatomy import anatomy
from headwise.attach import caching
from headwise.buffer import GROWTH
from headwise.cache.preallocated import Preallocated
from headwise.kv_cache import CacheMethod, kv_units
from headwise.method import catalogue, load

NAMES = ("llama", "qwen2", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox")
PROMPT, NEW = 24, 9
# Fields with which a method of the room has something to do on prompts of 24 tokens.
SMALL = {
    "adakv": {"window": 4, "capacity": 10, "kernel": 3},
    "duo": {"sink": 2, "recent": 6},
    "infllm": {"sink": 2, "recent": 8, "block": 4, "blocks": 2, "representatives": 2, "chunk": 3, "single": 4},
    "longheads": {"chunk": 4, "chunks": 5, "together": 3, "single": 4},
    "pages": {"budget": 16, "page": 4, "piece": 2, "interval": 2, "single": 4},
    "razor": {"sink": 2, "recent": 6, "share": 0.0},
    "snapkv": {"window": 4, "capacity": 10, "kernel": 3},
    "streaming": {"sink": 2, "recent": 6},
}
# Tokens that a KV head holds at most after a prompt of `had` tokens and `new` more; the rest of the room holds all.
HOLDS = {
    "adakv": lambda had, new: (10 + new) * GROWTH,
    "duo": lambda had, new: 8,
    "razor": lambda had, new: 2 + 1 + 6 + 2 * 16,
    "snapkv": lambda had, new: (10 + new) * GROWTH,
    "streaming": lambda had, new: 8,
}
METHODS = {card.name.split(".")[1]: card.name for card in catalogue("cache")}
# Few bits on top of other methods: a buffer, a ring, slots that move, buffers of many lengths.
CODED = {"int4 streaming": (4, "streaming"), "int8 razor": (8, "razor"), "int4 adakv": (4, "adakv")}
METHODS |= dict.fromkeys(CODED, "cache.quantised")
WAYS = {
    "padded batch": {},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "streamer": {},
}


def small(name: str) -> CacheMethod:
    if name in CODED:
        bits, inner = CODED[name]
        return load("cache.quantised")(bits=bits, of=small(inner))
    return load(METHODS[name])(**SMALL.get(name, {}))


def build(name: str, dtype: torch.dtype = torch.float32):
    family = FAMILIES[name]
    if name == "mistral":
        family = replace(family, fields={**family.fields, "sliding_window": None})
    model = family.build(dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def built_once():
    """Models by the name of their family, each built when it is first asked for."""
    made = {}
    return lambda name: made.setdefault(name, build(name))


def text(rows: int = 2, length: int = PROMPT, pads: tuple = (), seed: int = 0) -> dict:
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) >= torch.tensor(pads or (0,) * rows)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def through(model, inputs: dict, cache, turns: list[int]) -> torch.Tensor:
    """Logits [B, T, V] of a text read through a cache in turns of so many tokens, in a model that is entered."""
    return kv_twins.cached_logits(model, inputs["input_ids"], inputs["attention_mask"], cache, turns)


def decodes_as_itself(model, inputs: dict, turns: list[int]) -> None:
    """With everything kept, a text read in turns gives what it gives through transformers' own cache."""
    real, own = inputs["attention_mask"].bool(), DynamicCache(config=model.config)
    want = through(model, inputs, own, turns)
    with caching(model):
        got = through(model, inputs, Preallocated().build(model), turns)
    torch.testing.assert_close(got[real], want[real], atol=2e-4, rtol=1e-4)


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def generated(model, way: str) -> list:
    """Tokens that `generate` gives, in one of the ways in which users call it."""
    options = {"max_new_tokens": NEW, "do_sample": False, **WAYS.get(way, {})}
    inputs = text(pads=(0, 5)) if way in ("padded batch", "beams", "chunks", "sampling") else text(rows=1)
    if way == "prompt lookup":
        part = text(rows=1, length=8)["input_ids"]
        inputs = {"input_ids": part.repeat(1, 3), "attention_mask": torch.ones(1, PROMPT, dtype=torch.long)}
    torch.manual_seed(11)
    if way == "streamer":
        heard = Heard()
        model.generate(**inputs, **options, streamer=heard)
        return heard.tokens
    if way != "chat":
        return model.generate(**inputs, **options).tolist()
    first = model.generate(**inputs, **options, return_dict_in_generate=True)
    more = torch.cat([first.sequences, text(rows=1, length=7, seed=5)["input_ids"]], 1)
    mask = torch.ones_like(more)
    return model.generate(more, attention_mask=mask, **options, past_key_values=first.past_key_values).tolist()


def size(model, tokens: float, rows: int = 2) -> float:
    """Bytes of so many tokens in every KV head of the full-attention layers."""
    body = anatomy(model)
    layers = {int(unit.split(".")[0][1:]) for unit in kv_units(model)}
    width = sum(body.kv_heads(n) * (body.layer(n).head_dim + body.layer(n).value_dim) for n in layers)
    return rows * tokens * width * 4
