"""Are texts with drafts the texts without, token for token, in float32? Each drafter x cache x batch.

python bench/decode_exact.py writer [--prompts 200] [--tokens 64] [--caches duo pages ...]
    on a small writer of real text that is trained here: every drafter, trained draft heads among them, with every
    cache, one text at a time and in ragged batches of 4; writes bench/results/decode_exact.json
python bench/decode_exact.py default [--prompts 200] [--tokens 64]
    on the default model with transformers' own cache: the drafters that need no training; writes
    bench/results/decode_same.json
Each cache is saved when it is done; with --caches only these run, and what is known of the others is kept.
The quantised one needs torchao.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import machine
import race
import torch
from tqdm.auto import tqdm

from headwise import decode, open_model
from headwise.attach import treated
from headwise.cache.adakv import AdaKV
from headwise.cache.duo import Duo
from headwise.cache.infllm import InfLLM
from headwise.cache.longheads import LongHeads
from headwise.cache.pages import Pages
from headwise.cache.preallocated import Preallocated
from headwise.cache.quantised import Quantised
from headwise.cache.razor import Razor
from headwise.cache.snapkv import SnapKV
from headwise.cache.streaming import Streaming
from headwise.data.layout import pad_id
from headwise.data.requests import copying, open_ended
from headwise.decoding import with_heads
from headwise.draft_training import self_written, states_after, train
from headwise.replicate.drafted_text import windows, writer
from headwise.task import pad_left
from headwise.verifying import DraftMethod

CACHES = {
    "DynamicCache": None,
    "preallocated": Preallocated(),
    "duo": {unit: Duo(sink=4, recent=32) for unit in ("L0.G0", "L0.G1", "L1.G2", "L2.G0")},
    "streaming": Streaming(sink=4, recent=48),
    "snapkv": SnapKV(window=16, capacity=48),
    "adakv": AdaKV(window=16, capacity=48),
    "pages": Pages(budget=48, page=8, piece=8),
    "infllm": InfLLM(sink=4, recent=24, block=8, blocks=3, representatives=2, chunk=8),
    "longheads": LongHeads(chunk=8, chunks=5, together=8),
    "razor": {unit: Razor(sink=4, recent=32, share=0.0) for unit in ("L0.G0", "L0.G1", "L1.G2", "L2.G0")},
    "quantised": Quantised(8),
}
SIZES = (1, 4)
HEADS = {
    "Medusa": decode.Medusa,
    "Hydra": decode.Hydra,
    "Hydra++": decode.HydraPlus,
    "Clover": decode.Clover,
    "Chimera": decode.Chimera,
}
SHORTEST, LONGEST = 24, 120


def untrained(heads: decode.HeadCopying) -> dict[str, DraftMethod]:
    """The drafters that need no training."""
    return {
        "CopySpec": decode.CopySpec(),
        "copying by heads": heads,
        "CopySpec, else heads, paced": decode.Paced(decode.Either(decode.CopySpec(), heads)),
        "prompt lookup, our loop": decode.PromptLookup(),
        "itself with blocks left out": decode.SelfSpeculation(),
    }


def trained(model, text: torch.Tensor, folder: Path) -> dict[str, DraftMethod]:
    """Draft heads after a short training: good enough to be believed often, and to be wrong often."""
    draw = torch.Generator().manual_seed(1)
    ids = self_written(model, windows(text, 96, 32, draw), 64, temperature=0.5, seed=0, rows=48)
    states, made = states_after(model, ids), {}
    for name, kind in HEADS.items():
        torch.manual_seed(0)
        heads = kind().untrained(model)
        train(heads, states, ids, 120, rate=2e-3, rows=8, seed=0, name=name)
        heads.save_pretrained(folder / kind.__name__)
        made[name] = kind(path=str(folder / kind.__name__))
    return made


def chunks(prompts: list[list[int]], size: int, pad: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Prompts in batches, padded on the left, and their masks."""
    for start in range(0, len(prompts), size):
        yield pad_left(prompts[start : start + size], pad)


def identical(model, method: DraftMethod, ids: torch.Tensor, plain: torch.Tensor, how: dict) -> int:
    """Rows of a batch whose every token is that of plain greedy generation."""
    ours = method.generate(model, ids, **how).ids
    return 0 if ours.shape != plain.shape else sum(map(torch.equal, plain, ours))


def count(name: str, model, drafts: dict[str, DraftMethod], caches: dict, prompts: list[list[int]], pad: int, tokens):
    """Identical texts, for each drafter, cache and batch; saved after each cache."""
    bar = tqdm(total=len(caches) * len(SIZES) * len(prompts), desc=name)
    for cache, treatment in caches.items():
        rows = []
        for size in SIZES:
            same = dict.fromkeys(drafts, 0)
            with treated(model, treatment):
                for ids, mask in chunks(prompts, size, pad):
                    how = {"attention_mask": mask, "max_new_tokens": tokens, "do_sample": False}
                    plain = model.generate(ids, **how)
                    for drafter, method in drafts.items():
                        same[drafter] += identical(model, method, ids, plain, how)
                    bar.update(len(ids))
            rows += [
                {"cache": cache, "batch": size, "drafter": drafter, "texts": len(prompts), "identical": found}
                for drafter, found in same.items()
            ]
        about = {"machine": machine.facts(), "versions": race.particulars_of_ours(), "how": {"tokens": tokens}}
        race.save(name, {**about, "rows": [*(row for row in known(name) if row["cache"] != cache), *rows]})


def known(name: str) -> list[dict]:
    """What was counted before."""
    file = race.RESULTS / f"{name}.json"
    return json.loads(file.read_text())["rows"] if file.is_file() else []


def with_writer(prompts: int, tokens: int, caches: list[str]) -> None:
    """All of it on the small writer."""
    model, text, held = writer()
    draw, pick = random.Random("decode exact"), torch.Generator().manual_seed(2)
    asked = windows(held, prompts, LONGEST, pick).tolist()
    asked = [one[: draw.randint(SHORTEST, LONGEST)] for one in asked]
    heads = decode.HeadCopying(heads=tuple(f"L{layer}.H{head}" for layer in (1, 2) for head in range(3)), least=0.1)
    with tempfile.TemporaryDirectory() as folder:
        drafts = untrained(heads) | trained(model, text, Path(folder))
        count("decode_exact", model, drafts, {name: CACHES[name] for name in caches}, asked, 0, tokens)


def with_default(prompts: int, tokens: int, _: list[str]) -> None:
    """Transformers' own cache on the default model; half of the answers repeat a text."""
    model, tokenizer = open_model()
    drafts = untrained(with_heads(decode.HeadCopying(), model, tokenizer))
    asked = [
        one.ids
        for pair in zip(copying(tokenizer, prompts // 2, 1), open_ended(tokenizer, prompts // 2, 1), strict=True)
        for one in pair
    ]
    count("decode_same", model, drafts, {"DynamicCache": None}, asked, pad_id(tokenizer), tokens)


def main() -> None:
    jobs = {"writer": with_writer, "default": with_default}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=jobs)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=[*CACHES], help="writer: which ones")
    given = parser.parse_args()
    jobs[given.model](given.prompts, given.tokens, given.caches)


if __name__ == "__main__":
    main()
