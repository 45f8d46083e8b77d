"""Caches on a GPU: a random-weight model of a given shape, so that nothing need be downloaded.

python bench/gpu_cache.py [--shape 8b | small] [--device cuda] [--lengths 32768 131072] [--correct]

For each length: seconds of a chunked prefill, milliseconds a token, bytes and GPU peak, for transformers' DynamicCache
and for half of the KV heads full. With `--most`, the longest context before memory ends, by doubling and bisection.
`--correct` first compares every cache method on the device with itself on the CPU, in float32, on a tiny model.
Results go to bench/results/gpu_cache.json. `--shape small --device cpu --lengths 512` is the rehearsal without a GPU.
"""

import argparse
import random
from dataclasses import asdict

import machine
import race
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headwise.attach import caching
from headwise.bench import cost, dynamic
from headwise.cache.duo import Duo
from headwise.cache.preallocated import Preallocated
from headwise.kv_cache import KVCache, kv_units
from headwise.method import catalogue, load

SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 1 << 20,
        "rope_theta": 500000.0,
    },
    "small": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 1 << 20,
    },
}
CHUNK = 4096


def random_model(shape: str, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A llama of that shape with random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], attn_implementation="sdpa"))
    return model.to(dtype).eval()


def half(model) -> dict:
    """Half of the KV heads stream with DuoAttention's deployed window."""
    units = kv_units(model)
    return dict.fromkeys(random.Random(0).sample(units, len(units) // 2), Duo(64, 256))


def makers(model, most: int) -> dict:
    """The contestants."""
    return {
        "DynamicCache": dynamic(model),
        "all full": lambda: KVCache(model, dict.fromkeys(kv_units(model), Preallocated()), most),
        "50% full": lambda: KVCache(model, half(model), most),
    }


def correct(device: str) -> dict[str, float]:
    """{cache method: largest difference of logits, device against CPU}; a prompt in chunks, then single tokens."""
    found = {}
    ids = torch.randint(3, 128, (1, 96), generator=torch.Generator().manual_seed(0))
    for card in catalogue("cache"):
        logits = []
        for where in ("cpu", device):
            model = random_model("small", "cpu", torch.float32).to(where)
            try:
                method = load(card.name)()
                with caching(model), torch.no_grad():
                    cache = KVCache(model, dict.fromkeys(kv_units(model)[::2], method))
                    parts = [ids[:, :40], ids[:, 40:80], *ids[:, 80:].split(1, 1)]
                    outs = [model(input_ids=part.to(where), past_key_values=cache).logits for part in parts]
                logits.append(torch.cat(outs, 1).cpu())
            except (ValueError, TypeError, ImportError) as problem:
                found[card.name] = f"refused: {problem}"
                break
        else:
            found[card.name] = float((logits[0] - logits[1]).abs().max())
    return found


def longest(model, name: str, most: int) -> int:
    """Tokens of the longest prompt that can be read and followed by one token, to 2 %, up to `most`."""

    def fits(length: int) -> bool:
        ids = torch.zeros(1, length, dtype=torch.long)
        try:
            cost(model, {name: makers(model, length + 4)[name]}, ids, tokens=1, rounds=1, chunk=CHUNK)
        except torch.OutOfMemoryError:
            return False
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return True

    low, high = 0, CHUNK
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--most", type=int, default=0, help="longest context to try; 0 leaves this part out")
    parser.add_argument("--correct", action="store_true")
    given = parser.parse_args()
    result: dict = {"machine": machine.facts(), "versions": race.particulars_of_ours(), "shape": given.shape}
    if given.device.startswith("cuda"):
        result["gpu"] = torch.cuda.get_device_name()
    if given.correct:
        result["correct"] = correct(given.device)
    model = random_model(given.shape, given.device, torch.bfloat16)
    result["rows"] = []
    for at in given.lengths:
        ids = torch.randint(3, 100, (1, at), generator=torch.Generator().manual_seed(0))
        for one in cost(model, makers(model, at + 64), ids, tokens=8, rounds=7, chunk=CHUNK):
            result["rows"].append(asdict(one))
        race.save("gpu_cache", result)
    if given.most:
        result["longest"] = {name: longest(model, name, given.most) for name in makers(model, 1)}
    race.save("gpu_cache", result)


if __name__ == "__main__":
    main()
