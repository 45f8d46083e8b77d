"""Runs inside kvpress's own environment: the same prompts through its presses. Prints one line of JSON.

python kvpress_worker.py GIVEN.json, with {"model", "tasks": {task: [[context, [[question, answer], ...]], ...]},
"full": ["L5.G0", ...], "share", "texts"}. Contexts, questions and answers are token ids. By the texts kvpress chooses
heads; it would take them from a data set of the hub.
"""

import json
import sys
from pathlib import Path

import kvpress.presses.duo_attention_press as duo_attention
import pandas
import torch
from kvpress import AdaKVPress, DuoAttentionPress, SnapKVPress
from transformers import AutoModelForCausalLM, DynamicCache


def given_heads(full: list[str], layers: int, heads: int) -> DuoAttentionPress:
    """DuoAttention's press with the very heads of our plan, sinks 64 and window 256."""
    press = DuoAttentionPress(head_compression_ratio=0.5)
    mask = torch.ones(layers, heads, dtype=torch.bool)
    for unit in full:
        layer, head = unit[1:].split(".G")
        mask[int(layer), int(head)] = False

    def prepare(model):
        press.streaming_mask, press.recent_size, press.sink_size = mask, 256, 64

    press.post_init_from_model = prepare
    return press


def full_of(press: DuoAttentionPress) -> list[str]:
    """The KV heads that a press has left full, once it ran."""
    return [f"L{layer}.G{head}" for layer, head in (~press.streaming_mask).nonzero().tolist()]


class Texts:
    """What `load_dataset` gives, in place of BookSum."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def to_pandas(self) -> pandas.DataFrame:
        """One column, under the name that kvpress reads."""
        return pandas.DataFrame({"chapter": self.texts})


def size(cache) -> int:
    """Bytes of the memory behind the cache's tensors."""
    tensors = [one for layer in cache.layers for one in (layer.keys, layer.values)]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def run(model, press, rows: list) -> tuple[int, int, float]:
    """Answers right, answers, mean bytes: the context is read under the press, then each question is answered."""
    right = total = 0
    sizes = []
    for context, asked in rows:
        cache = DynamicCache()
        ids = torch.tensor([context])
        with torch.no_grad():
            if press is None:
                model(ids, past_key_values=cache)
            else:
                with press(model):
                    model.model(ids, past_key_values=cache)
            seen = len(context)
            before: list[int] = []
            for question, answer in asked:
                # The last token of an answer is read together with the question that follows. What is read are the
                # right tokens, as in headwise.recall: a wrong one misleads nothing behind it.
                feed, said = before[-1:] + question, []
                before = answer
                while len(said) < len(answer):
                    places = torch.arange(seen, seen + len(feed))
                    out = model(
                        torch.tensor([feed]),
                        past_key_values=cache,
                        position_ids=places[None],
                        cache_position=places,
                    )
                    seen += len(feed)
                    said.append(int(out.logits[0, -1].argmax()))
                    feed = [answer[len(said) - 1]]
                right += int(said == answer)
                total += 1
        sizes.append(size(cache))
    return right, total, sum(sizes) / len(sizes)


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    duo_attention.load_dataset = lambda *_, **__: Texts(given["texts"])
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32).eval()
    config = model.config
    presses = {
        "kvpress, no press": None,
        "kvpress DuoAttention, our heads": given_heads(
            given["full"], config.num_hidden_layers, config.num_key_value_heads
        ),
        "kvpress DuoAttention, its own choice": DuoAttentionPress(
            head_compression_ratio=1 - len(given["full"]) / (config.num_hidden_layers * config.num_key_value_heads),
            on_the_fly_scoring=True,
        ),
        "kvpress SnapKV": SnapKVPress(compression_ratio=1 - given["share"]),
        "kvpress Ada-KV": AdaKVPress(SnapKVPress(compression_ratio=1 - given["share"])),
    }
    found = {}
    for name, press in presses.items():
        try:
            scores, sizes = {}, []
            for task, rows in given["tasks"].items():
                right, total, mean = run(model, press, rows)
                scores[task] = right / total
                sizes.append(mean)
            found[name] = {"accuracy": scores, "bytes": sum(sizes) / len(sizes), "forced": True}
            if isinstance(press, DuoAttentionPress):
                found[name]["full"] = full_of(press)
        except Exception as problem:
            found[name] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
