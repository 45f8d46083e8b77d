"""Ways of generating that come together, and policies that have room for everything: tokens are those of the model."""

import pytest
import torch
from caches import NEW, WAYS, Heard, built_once, generated, text

from headwise.attach import treated
from headwise.cache import AdaKV, Duo, InfLLM, LongHeads, Pages, Preallocated, Razor, SnapKV, Streaming
from headwise.kv_cache import kv_units

TOGETHER = {
    "beams in chunks": {"num_beams": 3, "prefill_chunk_size": 5},
    "sampled beams": {"num_beams": 2, "do_sample": True, "top_k": 20},
    "sampling in chunks": {"do_sample": True, "prefill_chunk_size": 7, "temperature": 0.8},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "streamed lookup": {"prompt_lookup_num_tokens": 3},
    "chat in chunks": {"prefill_chunk_size": 5},
    "chat with lookup": {"prompt_lookup_num_tokens": 3},
}
ROOMY = [
    Preallocated(),
    Streaming(4, 128),
    Duo(4, 128),
    Duo(4, 128, whole=True),
    Razor(4, 128),
    SnapKV(capacity=128),
    AdaKV(capacity=128),
    Pages(),
    InfLLM(recent=128),
    LongHeads(chunk=4, chunks=60),
]


@pytest.fixture(scope="module")
def models():
    return built_once()


def said(model, way: str) -> list:
    """Tokens of one way, its prompt padded on the left where there is more than one."""
    how = {"max_new_tokens": NEW, "do_sample": False, **TOGETHER[way]}
    inputs = text(pads=(0, 5))
    if "lookup" in way or "chat" in way:
        part = text(rows=1, length=8)["input_ids"].repeat(1, 3)
        inputs = {"input_ids": part, "attention_mask": torch.ones_like(part)}
    torch.manual_seed(11)
    if way == "streamed lookup":
        heard = Heard()
        model.generate(**inputs, **how, streamer=heard)
        return heard.tokens
    if "chat" not in way:
        return model.generate(**inputs, **how).tolist()
    first = model.generate(**inputs, **how, return_dict_in_generate=True)
    more = torch.cat([first.sequences, text(rows=1, length=7, seed=5)["input_ids"]], 1)
    again = {"attention_mask": torch.ones_like(more), "past_key_values": first.past_key_values}
    return model.generate(more, **again, **how).tolist()


@pytest.mark.parametrize("way", TOGETHER)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
def test_ways_may_come_together(models, name, way):
    model = models(name)
    plain = said(model, way)
    with treated(model, {}):
        assert said(model, way) == plain


@pytest.mark.parametrize("way", [*WAYS, "chat"])
def test_qwen3_generates_what_it_did(models, way):
    plain = generated(models("qwen3"), way)
    with treated(models("qwen3"), {}):
        assert generated(models("qwen3"), way) == plain


@pytest.mark.parametrize("way", [*WAYS, "chat"])
@pytest.mark.parametrize("method", ROOMY, ids=lambda method: type(method).__name__)
def test_with_room_for_everything_every_policy_says_what_the_model_says(models, method, way):
    """All heads under the policy, and every other one."""
    model = models("llama")
    plain = generated(model, way)
    for units in (kv_units(model), kv_units(model)[::2]):
        with treated(model, dict.fromkeys(units, method)):
            assert generated(model, way) == plain
