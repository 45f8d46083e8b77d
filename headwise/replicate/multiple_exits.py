"""You Need Multiple Exiting: Dynamic Early Exiting for Accelerating Unified Vision Language Model. Tang et al., 2022.
arXiv:2211.11152

Row s145 of the mission. A small BART learns to translate a made-up language here, with a loss at every decoder layer,
where the paper has pictures and text. Thresholds are chosen on one set of texts and judged on another.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import BartConfig, BartForConditionalGeneration

from headwise.decode import MuE
from headwise.decode.mue import layerwise_loss
from headwise.progress import hidden
from headwise.replicate import Outcome, Replication, settle
from headwise.skipping import exiting

WORDS, LENGTH, LAYERS, WIDTH = 40, 8, 4, 64
PAD, BOS, EOS, SOURCE = 0, 1, 2, 3
GRID = (0.0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 1.1)


def sentences(rows: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Source ids [rows, LENGTH] and their translation [rows, LENGTH + 1] with its end.

    Every word has one translation; of two neighbours of which the first is of the first half of the words, an
    adjective, and the second is not, the translation turns the order round.
    """
    words = torch.randint(WORDS, (rows, LENGTH), generator=draw)
    said = words.clone()
    for place in range(0, LENGTH - 1, 2):
        turned = (words[:, place] < WORDS // 2) & (words[:, place + 1] >= WORDS // 2)
        said[:, place] = torch.where(turned, words[:, place + 1], words[:, place])
        said[:, place + 1] = torch.where(turned, words[:, place], words[:, place + 1])
    end = torch.full((rows, 1), EOS)
    return words + SOURCE, torch.cat([(said * 7) % WORDS + SOURCE + WORDS, end], 1)


@contextmanager
def confident(model: BartForConditionalGeneration, threshold: float):
    """The baseline: a decoder's token leaves where its likeliest word has at least this chance. Encoders have none."""
    head: Any = model.get_output_embeddings()

    def decide(number: int, before: Tensor, after: Tensor) -> Tensor:
        return head(after).softmax(-1).amax(-1) > threshold

    with exiting(model, decide) as depths:
        yield {"": depths}


@dataclass(frozen=True)
class MultipleExits(Replication):
    """Blocks saved in encoder and decoder at nearly the same translations, beside exits by confidence."""

    row: ClassVar[str] = "s145"
    claim: ClassVar[str] = (
        "Exits by similarity in encoder and decoder save much of the depth at nearly the same quality."
    )
    paper: ClassVar[str] = "up to 50 % and 40 % less time at 99 % and 96 % of the quality"

    least_saved: ClassVar[float] = 0.3
    least_kept: ClassVar[float] = 0.98
    least_learned: ClassVar[float] = 95.0

    def run(self, seed: int = 0) -> Outcome:
        """Train, choose thresholds for 99 % of the accuracy, judge on new texts."""
        torch.manual_seed(seed)
        draw = torch.Generator().manual_seed(seed)
        model = self._trained(draw, 3000 if self.full else 1500)
        dev, test = sentences(256, draw), sentences(1024 if self.full else 512, draw)
        whole, _, _ = self._read(model, dev, nullcontext({}))
        least = 0.99 * whole
        decoder = self._lowest(model, dev, least, lambda t: MuE(threshold=t, encoder=1.1).stacks(model))
        encoder = self._lowest(model, dev, least, lambda t: MuE(threshold=decoder, encoder=t).stacks(model))
        chance = self._lowest(model, dev, least, lambda t: confident(model, t))
        full, _, _ = self._read(model, test, nullcontext({}))
        ours = self._read(model, test, MuE(threshold=decoder, encoder=encoder).stacks(model))
        alone = self._read(model, test, MuE(threshold=decoder, encoder=1.1).stacks(model))
        theirs = self._read(model, test, confident(model, chance))
        numbers = {
            "thresholds": {"decoder": decoder, "encoder": encoder, "confidence": chance},
            "full": full,
            **{
                name: {"accuracy": right, "encoder saved": enc, "decoder saved": dec}
                for name, (right, enc, dec) in {"MuE": ours, "decoder alone": alone, "confidence": theirs}.items()
            },
        }
        return self._judge(numbers, len(test[0]))

    def _trained(self, draw: torch.Generator, steps: int) -> BartForConditionalGeneration:
        size = {"d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "max_position_embeddings": 32}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        wide = {"encoder_ffn_dim": 2 * WIDTH, "decoder_ffn_dim": 2 * WIDTH, "dropout": 0.0}
        ends = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "decoder_start_token_id": BOS}
        config = BartConfig(vocab_size=SOURCE + 2 * WORDS, **size, **heads, **wide, **ends, forced_eos_token_id=None)
        model = BartForConditionalGeneration(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        for step in tqdm(range(steps), desc="s145 training", disable=hidden(), leave=False):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1.0, (step + 1) / 100) * (1.02 - step / steps)
            ids, said = sentences(48, draw)
            given = torch.cat([torch.full((len(said), 1), BOS), said[:, :-1]], 1)
            out = model(input_ids=ids, decoder_input_ids=given, output_hidden_states=True, use_cache=False)
            loss = layerwise_loss(model, out.decoder_hidden_states, said)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return model.eval()

    def _read(self, model: BartForConditionalGeneration, texts: tuple, exits) -> tuple[float, float, float]:
        """Percent of words right, and shares of encoder and decoder blocks saved."""
        ids, said = texts
        options = {"max_new_tokens": LENGTH + 1, "min_new_tokens": LENGTH + 1, "do_sample": False}
        with torch.no_grad(), exits as depths:
            found = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=1, **options)[:, 1:]
        saved = [depths[stack].saved if stack in depths else 0.0 for stack in ("enc", "")]
        return 100 * float((found[:, :LENGTH] == said[:, :LENGTH]).float().mean()), saved[0], saved[1]

    def _lowest(self, model: BartForConditionalGeneration, texts: tuple, least: float, exits) -> float:
        """The lowest threshold of the grid that keeps this accuracy."""
        for threshold in GRID:
            if self._read(model, texts, exits(threshold))[0] >= least:
                return threshold
        return GRID[-1]

    def _judge(self, numbers: dict, n: int) -> Outcome:
        def saved(name: str) -> float:
            return (numbers[name]["encoder saved"] + numbers[name]["decoder saved"]) / 2

        kept = numbers["MuE"]["accuracy"] / numbers["full"]
        checks = {
            f"at least {self.least_saved:.0%} of all blocks are saved at {self.least_kept:.0%} of the accuracy": saved(
                "MuE"
            )
            >= self.least_saved
            and kept >= self.least_kept,
            f"the whole model gets at least {self.least_learned:.0f} % of words right": numbers["full"]
            >= self.least_learned,
            "more is saved than by confidence": saved("MuE") > saved("confidence"),
            "exits in the encoder save more than those of the decoder alone": saved("MuE") > saved("decoder alone"),
        }

        def words(name: str) -> str:
            one = numbers[name]
            return (
                f"encoder {one['encoder saved']:.0%} and decoder {one['decoder saved']:.0%} of blocks saved, "
                f"{one['accuracy']:.1f} % of words right"
            )

        measured = f"{words('MuE')} ({kept:.1%} of the whole model's {numbers['full']:.1f} %); {n} sentences"
        if bottom := [name for name, limit in numbers["thresholds"].items() if limit == GRID[0]]:
            measured += (
                f". The task is easy: for {' and '.join(bottom)} the lowest threshold tried, {GRID[0]:g}, was taken"
            )
        baseline = (
            f"confidence, which encoders do not have: {words('confidence')}; similarity in the decoder alone: "
            f"{words('decoder alone')}"
        )
        return settle(measured, baseline, checks, numbers)
