"""The base of the decode room, and the one loop that checks what drafters propose.

    loop = Verifying(drafter)
    model.generate(**inputs, custom_generate=loop)
    loop.stats

What comes out is what the model alone would have generated: the same tokens where it is greedy, tokens of the same
distribution where it samples. One forward pass reads the newest token of each row and its draft; what the model agrees
to stays, with one token more that the model chose itself.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from headwise.accepting import Line, Rules, Walk
from headwise.attach import caching
from headwise.drafting import NO_ROOM, WAITS, Draft, Drafter, News, Reading, Stats, last_states, states_of
from headwise.kv_cache import KVCache
from headwise.method import Method
from headwise.rewinding import end_recording, follows_masks, keep_columns, tree_mask, turn_limit

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Decoded:
    """What a decode method generated.

    Attributes:
        ids: [B, T] prompts and what follows; where a row ended earlier than others it is padded on the right.
        stats: what became of the drafts.
    """

    ids: Tensor
    stats: Stats


@dataclass(frozen=True)
class DecodeMethod(Method):
    """Base of the decode room: which token comes next."""

    def generate(
        self, model: PreTrainedModel, ids: Tensor, streamer: "BaseStreamer | None" = None, **options: Any
    ) -> Decoded:
        """Generate from ids [B, T], padded on the left; `options` are those of `model.generate`.

        A method that drafts derives from `DraftMethod` and writes `drafter` instead.
        """
        raise TypeError(f"{type(self).__name__} does not say how it generates.")


@dataclass(frozen=True)
class DraftMethod(DecodeMethod):
    """Base of methods that propose tokens for the model to check; what comes out is the model's own."""

    def drafter(self, model: PreTrainedModel) -> Drafter:
        """A drafter for this model. Raises ValueError where it does not fit the model (width, vocabulary)."""
        raise TypeError(f"{type(self).__name__} does not say how it drafts.")

    def generate(
        self, model: PreTrainedModel, ids: Tensor, streamer: "BaseStreamer | None" = None, **options: Any
    ) -> Decoded:
        """Generate as `model.generate(ids, **options)` does, with drafts.

        Args:
            ids: [B, T] prompts, padded on the left; give the `attention_mask` where they are.
            streamer: gets the tokens as they are accepted; for one row. It must be given here, as `model.generate`
                keeps its own `streamer` from loops that are not transformers' own.
            options: those of `model.generate`, such as max_new_tokens, do_sample, past_key_values.

        Raises:
            ValueError: no prompt, nothing to generate, beams, a cache that cannot forget, a drafter that does not fit.
        """
        check_request(ids, options)
        return run(Verifying(self.drafter(model), streamer), model, ids, options)


def check_request(ids: Tensor, options: "dict[str, Any]") -> None:
    """Raises ValueError: no prompt, or nothing to generate."""
    if ids.ndim != 2 or not ids.numel():
        raise ValueError(
            f"The prompt has the shape {list(ids.shape)}; allowed is [rows, tokens] with 1 or more of each."
        )
    most = options.get("max_new_tokens")
    if most is not None and most < 1:
        raise ValueError(f"max_new_tokens is {most}; allowed is 1 or more.")


def run(loop: "Verifying", model: PreTrainedModel, ids: Tensor, options: "dict[str, Any]") -> Decoded:
    """Let a loop generate, with a headwise cache where the options have one."""
    ours = isinstance(options.get("past_key_values"), KVCache)
    with caching(model) if ours else nullcontext():
        found = model.generate(ids, custom_generate=loop, **options)
    return Decoded(found if isinstance(found, Tensor) else found.sequences, loop.stats)


class Verifying:
    """Generates with drafts; give it to `model.generate` as `custom_generate`, for one call at a time.

    Args:
        drafter: proposes tokens.
        streamer: as in `model.generate`, which does not hand its own on. For one row.
        heard: called with the stats after each pass.

    Attributes:
        stats: what became of the drafts of the last run.
    """

    def __init__(
        self,
        drafter: Drafter,
        streamer: "BaseStreamer | None" = None,
        heard: "Callable[[Stats], None] | None" = None,
    ) -> None:
        self.drafter, self.streamer, self.heard = drafter, streamer, heard
        self.stats = Stats()

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> "Tensor | GenerateDecoderOnlyOutput":
        """What transformers calls; see the class."""
        _refuse(model, input_ids, generation_config, model_kwargs, self.streamer)
        began, self.stats = time.perf_counter(), Stats(rows=input_ids.shape[0])
        rules = Rules(logits_processor, stopping_criteria, generation_config, len(input_ids))
        one = _Run(self, model, input_ids, rules, model_kwargs)
        try:
            with self.drafter.watch(model), torch.no_grad():
                one.begin(generation_config)
                self.stats.prefill = time.perf_counter() - began
                while one.active:
                    self._told(began)
                    one.step()
        finally:
            end_recording(one.cache)
        self._told(began)
        if self.streamer is not None:
            self.streamer.end()
        found = one.texts(generation_config)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=found, past_key_values=one.cache)
        return found

    def _told(self, began: float) -> None:
        self.stats.seconds = time.perf_counter() - began
        if self.heard is not None:
            self.heard(self.stats)


def _refuse(
    model: PreTrainedModel, ids: Tensor, config: GenerationConfig, options: dict[str, Any], streamer: Any
) -> None:
    """Raises ValueError where drafts cannot be verified."""
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        raise ValueError(f"{kind} is an encoder-decoder; drafts are verified for decoder-only models.")
    if config.num_beams > 1:
        raise ValueError(f"num_beams is {config.num_beams}; drafts are verified for 1 beam.")
    if not ids.shape[1] or options.get("inputs_embeds") is not None:
        raise ValueError("Drafts need a prompt of token ids; embeddings alone were given.")
    if not options.get("use_cache") or options.get("past_key_values") is None:
        raise ValueError(f"Drafts need a cache; this {kind} was to generate without one. Allowed is use_cache=True.")
    asked = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    if wanted := [name for name in asked if config.return_dict_in_generate and getattr(config, name)]:
        raise ValueError(f"{wanted[0]} is not handed back with drafts; allowed is return_dict_in_generate alone.")
    if streamer is not None and len(ids) > 1:
        raise ValueError(f"A streamer shows one row; {len(ids)} were given.")


class _Run:
    """One call: the texts, the cache, and what of the texts the cache does not hold yet.

    Attributes:
        active: rows whose text has not ended. places: which row stands in each place of the model's batch.
        pending: {row: tokens of the text that the cache does not hold}, 1 or more.
        apart: whether rows may keep different numbers of columns. lent: whether somebody else has the cache too.
        widest: tokens that one pass may read.
        past: columns of the cache. mask: [places, past], or None where all columns are seen by every place.
    """

    def __init__(self, loop: Verifying, model: PreTrainedModel, ids: Tensor, rules: Rules, options: dict) -> None:
        self.drafter, self.stats, self.streamer = loop.drafter, loop.stats, loop.streamer
        self.model, self.rules, self.ids = model, rules, ids
        self.options = dict(options)
        self.cache = options["past_key_values"]
        self.lines = [Line(row, rules.most, number) for number, row in enumerate(ids)]
        self.active, self.places = list(range(len(ids))), list(range(len(ids)))
        self.pending: dict[int, list[int]] = {}
        self.held: dict[int, Draft] = {}
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        self.apart = self.lent = False
        self.past = self.widest = 0
        self.mask: Tensor | None = options.get("attention_mask")
        positions = options.get("position_ids")
        self.first = None if positions is None else positions[..., -1:] + 1

    def begin(self, config: GenerationConfig) -> None:
        """Read the prompts and choose the first tokens."""
        had = self.cache.get_seq_length()
        if self.streamer is not None:
            self.streamer.put(self.ids.cpu())
        with last_states(self.model, self.drafter.wants_hidden) as seen:
            outputs = self.model._prefill(self.ids, config, dict(self.options))
        self.stats.passes += 1
        if not getattr(self.cache, "is_croppable", True):
            kind = self.model.config.model_type
            raise ValueError(f"The cache of this {kind} cannot take tokens back, so drafts cannot be verified.")
        self.past = self.cache.get_seq_length()
        self.lent = config.return_dict_in_generate or getattr(self.cache, "_is_user_defined", False)
        self.cache.activate_past_recording()
        self.apart, self.widest = follows_masks(self.model, self.cache), turn_limit(self.cache)
        for name in ("past_key_values", "attention_mask", "position_ids"):
            self.options.pop(name, None)
        width = self.past - had
        real = torch.ones(len(self.ids), width) if self.mask is None else self.mask[:, -width:]
        texts = [row[-len(keep) :][keep].tolist() for row, keep in zip(self.ids, self._real(), strict=True)]
        self.drafter.begin(self.model, texts, self.rules.sampling)
        known = self.rules.read(outputs.logits[:, -1:])
        news, columns = {}, {}
        for row in list(self.active):
            walk = self.rules.walk(known[row], 0, Draft([]), self.lines[row])
            self.pending[row] = list(walk.tokens)
            columns[row] = real[row].nonzero()[:, 0].tolist()
            news[row] = News(walk.tokens, states_of(seen, row, columns[row]))
            self._said(row, walk)
        self._tell(news, Reading(columns, {row: row for row in self.active}, width))
        self._drop()

    def _real(self) -> Tensor:
        """[B, T] which ids of the prompts are no padding."""
        if self.mask is None:
            return torch.ones_like(self.ids, dtype=torch.bool)
        width = min(self.ids.shape[1], self.mask.shape[1])
        return self.mask[:, -width:].bool()

    def step(self) -> None:
        """Read the newest tokens with their drafts, and keep what the model agrees to."""
        drafts = self._drafts()
        feeds, width = self._feeds(drafts)
        with last_states(self.model, self.drafter.wants_hidden) as seen:
            logits = self._read(feeds, drafts, width)
        self.stats.passes += 1
        known = self.rules.read(logits)
        news, columns, kept = {}, {}, {}
        walked: dict[int, Walk] = {}
        for place, row in enumerate(self.places):
            if row not in self.active:
                continue
            own, draft = self.pending[row], drafts[row]
            if len(own) > width:
                kept[row] = list(range(width))
                self.stats.note(Draft([]), 0, WAITS)
                continue
            walk = walked[row] = self.rules.walk(known[place], len(own) - 1, draft, self.lines[row])
            self.stats.note(draft, len(walk.path), walk.why)
            read = [len(own) + index for index in walk.path][: len(walk.tokens) - 1]
            kept[row] = [*range(len(own)), *read]
            columns[row] = [len(own) - 1, *read]
            self.pending[row] = own + walk.tokens
            news[row] = News(walk.tokens, states_of(seen, place, columns[row]))
            self.held.pop(row, None)
        self._keep(kept, width)
        places = {row: place for place, row in enumerate(self.places) if row in news}
        for row, walk in walked.items():
            self._said(row, walk)
        self._tell(news, Reading(columns, places, width))
        self._drop()

    def _drafts(self) -> dict[int, Draft]:
        """One draft for each active row, of tokens that there is room for. A row that waited keeps the one it has."""
        rooms = {row: self.lines[row].room - 1 for row in self.active}
        asked = {row: room for row, room in rooms.items() if room > 0 and row not in self.held}
        self.held |= self.drafter.propose(asked) if asked else {}
        drafts = {}
        for row in self.active:
            draft = self.held.get(row, Draft([], why=NO_ROOM if rooms[row] <= 0 else Draft([]).why))
            draft.check(self.vocabulary)
            drafts[row] = (draft if self.apart else draft.chain()).cut(max(0, min(rooms[row], self.widest - 1)))
        return drafts

    def _feeds(self, drafts: dict[int, Draft]) -> tuple[dict[int, list[int]], int]:
        """What each row reads in this pass, and how wide the pass is.

        Where rows go together, the width is what those rows need that know nothing beyond the cache but their newest
        token; the others read what they know already, and of their drafts what fits.
        """
        level = [row for row in self.active if len(self.pending[row]) == 1]
        least = min(len(self.pending[row]) for row in self.active)
        width = min(self.widest, max([least, *(1 + len(drafts[row].tokens) for row in level)]))
        for row in self.active:
            if (over := len(self.pending[row]) + len(drafts[row].tokens) - width) > 0:
                drafts[row] = drafts[row].cut(max(0, len(drafts[row].tokens) - over))
        return {row: (self.pending[row] + drafts[row].tokens)[:width] for row in self.active}, width

    def _read(self, feeds: dict[int, list[int]], drafts: dict[int, Draft], width: int) -> Tensor:
        """The logits [places, width, V] of one pass."""
        device = self.ids.device
        # Places whose text has ended, and what is left of a row, read any token; nobody looks at what comes of it.
        rows = [feeds.get(row, [0]) for row in self.places]
        ids = torch.tensor([one + [one[-1]] * (width - len(one)) for one in rows], device=device)
        options = dict(self.options)
        if self.first is not None:
            depths = [self._depths(row, drafts, width) for row in self.places]
            options["position_ids"] = self.first + torch.tensor(depths, device=self.first.device)
        options["attention_mask"] = self._seen(feeds, drafts, width)
        if (kinds := options.get("token_type_ids")) is not None:
            options["token_type_ids"] = kinds[:, -1:].expand(-1, width)
        inputs = self.model.prepare_inputs_for_generation(ids, past_key_values=self.cache, **options)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = width
        return self.model(**inputs, return_dict=True).logits[:, -width:].to(device)

    def _depths(self, row: int, drafts: dict[int, Draft], width: int) -> list[int]:
        """How many tokens after the prompt each column of a row stands; places that have ended stand still."""
        if row not in self.active:
            return [0] * width
        line, own = self.lines[row], len(self.pending[row])
        begun = line.length - line.start - own
        depths = list(range(begun, begun + width))
        if (parents := drafts[row].parents) is not None:
            for index, parent in enumerate(parents):
                depths[own + index] = depths[own + parent] + 1
        return depths

    def _seen(self, feeds: dict[int, list[int]], drafts: dict[int, Draft], width: int) -> Tensor | None:
        """The mask of a pass: none, [places, past + width], or the mask of a tree."""
        parents = [drafts[row].parents if row in drafts else None for row in self.places]
        if any(one is not None for one in parents):
            seen = self.mask if self.mask is not None else self.ids.new_ones(len(self.places), self.past)
            fed = [len(self.pending[row]) if row in self.active else 1 for row in self.places]
            return tree_mask(seen, fed, parents, width, self.model.dtype)
        if self.mask is None:
            return None
        return torch.cat([self.mask, self.mask.new_ones(len(self.mask), width)], 1)

    def _keep(self, kept: dict[int, list[int]], width: int) -> None:
        """Leave in the cache what every row has kept of a pass: columns of the pass, oldest first."""
        counts = [len(one) for one in kept.values()]
        most = max(counts) if self.apart else min(counts)
        rows = [kept.get(row, [])[:most] for row in self.places]
        if any(one != list(range(len(one))) for one in rows):
            filled = torch.tensor([one + [0] * (most - len(one)) for one in rows], device=self.ids.device)
            keep_columns(self.cache, self.past, filled)
        self.cache.crop(most - width)
        if self.mask is not None or any(len(one) < most for one in rows):
            if self.mask is None:
                self.mask = self.ids.new_ones(len(self.places), self.past)
            new = [[1] * len(one) + [0] * (most - len(one)) if self.apart else [1] * most for one in rows]
            self.mask = torch.cat([self.mask, torch.tensor(new, device=self.mask.device, dtype=self.mask.dtype)], 1)
        self.past += most
        for row in kept:
            self.pending[row] = self.pending[row][min(most, len(kept[row])) :]

    def _said(self, row: int, walk: Walk) -> None:
        """Note and show what was added to a row."""
        self.stats.tokens += len(walk.tokens)
        if self.streamer is not None:
            self.streamer.put(torch.tensor([walk.tokens]))
        if walk.stopped:
            self.active.remove(row)

    def _tell(self, news: dict[int, News], read: Reading) -> None:
        if self.active:
            self.drafter.accept({row: one for row, one in news.items() if row in self.active}, read)

    def _drop(self) -> None:
        """Let go of rows that have ended, where the cache is nobody else's."""
        if not self.active or len(self.active) == len(self.places) or self.lent:
            return
        stay = [place for place, row in enumerate(self.places) if row in self.active]
        index = torch.tensor(stay, device=self.ids.device)
        self.cache.batch_select_indices(index)
        self.mask = None if self.mask is None else self.mask[index]
        if self.first is not None:
            self.first = self.first.index_select(self.first.ndim - 2, index.to(self.first.device))
        self.places = [self.places[place] for place in stay]

    def texts(self, config: GenerationConfig) -> Tensor:
        """[B, T] everything, padded on the right."""
        pad = getattr(config, "_pad_token_tensor", None)
        longest = max(line.length for line in self.lines)
        found = self.ids.new_full((len(self.lines), longest), 0 if pad is None else int(pad))
        for row, line in enumerate(self.lines):
            found[row, : line.length] = line.ids[: line.length]
        return found
