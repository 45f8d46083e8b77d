"""The main job: score every head, screen, prove, fill the atlas. What is done is kept, so a second run resumes."""

import json
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headwise.anatomy import anatomy
from headwise.atlas import Atlas
from headwise.claim import ROLES, Claim, Role, settle
from headwise.heads import Ablation, Attribution, DuoGate, Restore
from headwise.matmul import fast_matmul
from headwise.method import HeadMethod, load
from headwise.pattern import PatternMethod, score_together
from headwise.progress import hidden
from headwise.readouts import readouts
from headwise.score import Score, provenance
from headwise.stats import spearman
from headwise.tap import tap
from headwise.task import Batch, Task, answer_logits, correct, logprob
from headwise.verify import NULLS, Proof

log = logging.getLogger(__name__)

# What is read of each kind of model; the task of each method is its own `needs`.
SEEN = {
    "decoder": (
        "induction", "previous_token", "current_token", "duplicate_token", "sink", "local_share", "attention_distance",
        "entropy", "echo", "razor_induction", "retrieval", "name_mover", "copying", "qk_eigenvalues",
        "copy_suppression",
        "successor", "composition", "select_and_copy", "memory_or_context", "topic", "anti_overconfidence",
    ),
    "encoder": ("previous_token", "current_token", "duplicate_token", "sink", "local_share", "attention_distance",
                "entropy"),
    "vision": ("distance_profile", "entropy"),
}  # fmt: skip
# How many prompts of a task where nobody says; the first half screens and nominates, the second half proves.
PROMPTS = 40
# Tasks whose prompts are not of the usual number or size: needles are shorter than the task's default, so that proofs
# on them take seconds. The model must answer clean prompts this much better (nats) for anything to be provable.
SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "repeated_tokens": (8, {}),
    "induction": (64, {}),
    "needle": (24, {"length": 160}),
}
LEAST_GAP = 0.5
# What vision models are shown, by every detector that other models would read text with.
PICTURES = "digits_images"


@dataclass(frozen=True)
class Job:
    """How a model is mapped.

    Fields:
        prompts: prompts of each task; the first half screens and nominates, the second half proves. None for the number
            that suits each task: 64 for induction, 24 needles, 8 repeated sequences (all of them to look at), else 40.
        candidates: at most so many heads are tested for one role; nulls: random heads they are compared with.
        thorough: measure the exact effect of every head on every task, not only of nominated ones and of the null.
        seed: of all prompts and draws.
    """

    prompts: int | None = None
    candidates: int = 6
    nulls: int = NULLS
    thorough: bool = False
    seed: int = 0


def kind_of(model: PreTrainedModel) -> str:
    """decoder, encoder or vision: what the model takes and which way it looks.

    Raises:
        ValueError: an encoder-decoder, whose heads can be tapped and ablated one by one but are not mapped yet.
    """
    if model.main_input_name == "pixel_values":
        return "vision"
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder: its sites can be tapped and changed from Python, but `map` "
            "covers decoders, encoders and vision models."
        )
    layer = anatomy(model).layer(anatomy(model).layers[0])
    causal = getattr(layer.attention, "is_causal", None)
    if causal is None:
        causal = model.can_generate()
    return "decoder" if causal else "encoder"


def map_model(
    model: PreTrainedModel,
    tokenizer: Any,
    atlas_path: "str | Path",
    *,
    methods: tuple[str, ...] = (),
    job: Job | None = None,
    step: int = 0,
) -> Atlas:
    """Score every head of a model and prove what can be proved.

    Args:
        tokenizer: the model's tokenizer, or its image processor.
        methods: names of heads-room methods; empty for all that fit the model, and the proofs.
        step: training step under which the scores are kept; claims are made of step 0 only, the atlas's own weights.

    Raises:
        ValueError: an unknown method, an atlas of other weights, or a model that cannot be mapped.
    """
    job = job or Job()
    kind = kind_of(model)
    atlas = Atlas.of(model, atlas_path, tokenizer, step)
    bench = _Bench(model, tokenizer, atlas, job, step)
    whole = not methods and step == 0
    if whole:
        atlas.note(skipped=None)
    names = methods or SEEN[kind]
    bench.look(names)
    for name in _bar(names, "heads seen"):
        bench.seen(name)
    if whole and kind == "decoder":
        for task in _bar(list(dict.fromkeys(r.task for r in ROLES if r.task)), "screen"):
            bench.screen(task)
        if job.thorough:
            for task in list(bench.able):
                bench.scan_all(task)
    elif whole:
        bench.skip("proofs", f"this is a model of the kind {kind}: it does not continue text, so no task shows a role")
    if whole and kind != "vision":
        bench.prove_all()
    if kind != "vision":
        bench.patterns()
        if not atlas.has_readouts():
            atlas.add_readouts(readouts(model, tokenizer))
    return atlas


def _bar(items: "tuple[str, ...] | list[str]", label: str) -> Iterator[str]:
    with tqdm(items, desc=label, disable=hidden(), leave=False) as bar:
        for item in bar:
            bar.set_postfix_str(item)
            yield item


class _Bench:
    """One run of the job: makes each task's prompts once, and keeps what is done."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, atlas: Atlas, job: Job, step: int) -> None:
        self.model, self.tokenizer, self.atlas, self.job, self.step = model, tokenizer, atlas, job, step
        self.batches: dict[str, Batch] = {}
        self.able: dict[str, dict[str, float]] = {}
        self.scores: dict[str, Score] = {}

    def batch(self, task: str) -> Batch:
        """All prompts of a task."""
        if task not in self.batches:
            n = self.job.prompts or SIZES.get(task, (PROMPTS, {}))[0]
            batch = task_of(task).make(self.tokenizer, n=n, seed=self.job.seed)
            self.batches[task] = fit_pictures(batch, self.model) if task == PICTURES else batch
        return self.batches[task]

    def _keep(self, method: HeadMethod, batch: Batch | None, name: str | None = None) -> Score | None:
        """The method's score, from the atlas when it is there; None, with the reason kept, when it cannot be had."""
        about = provenance(method, self.model, batch)
        kept = self.atlas.made(about, self.step)
        if kept is not None:
            self.scores[name or kept.name] = kept
            return kept
        # Attribution and gates differentiate, which fast products do not allow.
        fast = nullcontext() if isinstance(method, (Attribution, DuoGate)) else fast_matmul(self.model)
        try:
            with fast:
                score = method.score(self.model, batch)
        except ValueError as reason:
            label = name or method.identity()["name"]
            log.warning("%s: %s", label, reason)
            self.skip(label, str(reason))
            return None
        score = self.scores[name or score.name] = replace(score, step=self.step, name=name or score.name)
        self.atlas.add(score)
        return score

    def look(self, names: tuple[str, ...]) -> None:
        """All detectors that read patterns of the same task, in one pass."""
        by_task: dict[str, list[PatternMethod]] = {}
        for method in map(_method, names):
            if isinstance(method, PatternMethod):
                by_task.setdefault(self._wants(method), []).append(method)
        for task, methods in by_task.items():
            try:
                batch = self._dev(task)
                todo = [m for m in methods if self.atlas.made(provenance(m, self.model, batch), self.step) is None]
                with fast_matmul(self.model):
                    scores = score_together(todo, self.model, batch) if todo else []
            except ValueError as reason:
                # Each of them is tried alone next, and says why it cannot be had.
                log.debug("%s: %s", task, reason)
                continue
            for score in scores:
                self.atlas.add(replace(score, step=self.step))

    def seen(self, name: str) -> Score | None:
        """One detector on the development half of its task."""
        method = _method(name)
        try:
            batch = self._dev(self._wants(method)) if method.needs else None
        except ValueError as reason:
            self.skip(name, str(reason))
            return None
        return self._keep(method, batch)

    def _wants(self, method: HeadMethod) -> str:
        return PICTURES if self.model.main_input_name == "pixel_values" else method.needs

    def _dev(self, task: str) -> Batch:
        batch = self.batch(task)
        return batch if task == "repeated_tokens" else batch.split()[0]

    def screen(self, task: str) -> None:
        """Can the model do the task, and which heads does the gradient point at?"""
        try:
            batch = self.batch(task)
        except ValueError as reason:
            self.skip(task, str(reason))
            return
        done = self.atlas.about.get("tasks", {}).get(task)
        if done is None or done["n"] != len(batch):
            done = _ability(self.model, batch)
            self.atlas.note(tasks={**self.atlas.about.get("tasks", {}), task: done})
        if batch.corrupt is None or not done["clean"] - done["corrupt"] >= LEAST_GAP:
            self.skip(
                task,
                f"the answer has {done['clean']:.2f} nats in clean prompts and {done['corrupt']:.2f} in corrupt ones, "
                f"less than {LEAST_GAP} apart: this model does not do the task, so no head can be proved on it",
            )
            return
        self.able[task] = done
        self._keep(Attribution(), batch.split()[0], f"attribution_on_{task}")

    def scan_all(self, task: str) -> None:
        """Exact effects of every head on one task's held-out prompts, and how well the cheap screen had ranked them."""
        held_out = self.batch(task).split()[1]
        exact = self._keep(Ablation(value="resample"), held_out, f"ablation_resample_on_{task}")
        screen = self.scores[f"attribution_on_{task}"]
        assert exact is not None  # a task in `able` has corrupt prompts, and every unit exists
        agreement = round(spearman(screen.table["value"].to_numpy(), exact.table["value"].to_numpy()), 4)
        told = self.atlas.about["tasks"]
        self.atlas.note(tasks={**told, task: told[task] | {"screen_rank_correlation": agreement}})
        self._keep(Ablation(value="mean"), held_out, f"ablation_mean_on_{task}")
        self._keep(Restore(), held_out, f"restore_on_{task}")

    def nominate(self, role: Role) -> list[str]:
        """Heads whose score reaches the role's threshold, the ones that the gradient screen points at first."""
        score = self.scores[role.score]
        table = score.table.filter(score.table["value"] >= role.threshold)
        units = table["unit"].to_list()
        screen = self.scores.get(f"attribution_on_{role.task}")
        if len(units) > self.job.candidates and screen is not None:
            weight = dict(screen.table.select("unit", "value").iter_rows())
            units.sort(key=lambda u: weight.get(u, 0.0), reverse=True)
        return units

    def prove_all(self) -> None:
        """Prove every role whose task the model can do, then settle all claims together."""
        proof = Proof(nulls=self.job.nulls, seed=self.job.seed)
        open_roles = [r for r in ROLES if r.score in self.scores]
        claims: list[Claim] = []
        for name in _bar([r.name for r in open_roles], "proofs"):
            claims += self._prove(next(r for r in open_roles if r.name == name), proof)
        # What an earlier run claimed of these roles and this one does not is stale.
        self.atlas.add_claims(settle(claims), only_of={r.name for r in ROLES})

    def _prove(self, role: Role, proof: Proof) -> list[Claim]:
        nominated = self.nominate(role)
        seen = self.scores[role.score]
        tested = nominated[: self.job.candidates] if role.task in self.able else []
        untested = [u for u in nominated if u not in tested]
        claims = [Claim(u, role.name, rungs=[proof.seen(seen, u)], about=seen.about) for u in untested]
        if not tested:
            return claims
        held_out = self.batch(role.task).split()[1]
        wanted = provenance(proof, self.model, held_out)
        before = {c.unit: c for c in self.atlas.claims(role=role.name)}
        try:
            wanted["nulls"] = proof.draw(self.model, tested, set(nominated))
            if all(u in before and _same(before[u].about, wanted) for u in tested):
                return claims + [before[u] for u in tested]
            fresh = proof.run(self.model, held_out, role.name, tested, seen, set(nominated), label=role.name)
        except ValueError as reason:
            log.warning("%s: %s", role.name, reason)
            self.skip(role.name, str(reason))
            return claims
        # Kept at once, so that an interrupted run loses one role at most, and unknown until the last role is done: the
        # correction over the whole map may take back what one role by itself would show.
        self.atlas.add_claims(fresh)
        return claims + fresh

    def patterns(self) -> None:
        """Attention patterns of one short prompt a task, for the page."""
        for task in [t for t in ("induction", "ioi", "capitals", "repeated_tokens") if t in self.batches]:
            if task in self.atlas.patterns():
                continue
            row = self.batch(task).take(slice(0, 1))
            real = row.inputs["attention_mask"][0].bool() if "attention_mask" in row.inputs else slice(None)
            ids = row.ids[0][real][:64]
            with (
                torch.no_grad(),
                tap(self.model, "pattern", reduce=lambda p: (p[0].float() * 255).round().to(torch.uint8)) as t,
            ):
                self.model.base_model(ids[None].to(self.model.device))
            tokens = [self.tokenizer.decode([i]) for i in ids.tolist()]
            arrays = {layer: value.cpu().numpy() for layer, value in t.by_layer("pattern").items()}
            self.atlas.add_pattern(task, tokens, self.tokenizer.decode(ids), arrays)

    def skip(self, what: str, reason: str) -> None:
        """Keep why something could not be measured."""
        self.atlas.note(skipped={**self.atlas.about.get("skipped", {}), what: reason})


def fit_pictures(batch: Batch, model: PreTrainedModel) -> Batch:
    """Pictures [n, 1, 8, 8] in the size and with as many channels as a vision model takes, noted in `about`."""
    size, channels = model.config.image_size, getattr(model.config, "num_channels", 1)
    pixels = batch.inputs["pixel_values"]
    wanted = (channels, size, size) if isinstance(size, int) else (channels, *size)
    if pixels.shape[1:] == wanted:
        return batch
    larger = torch.nn.functional.interpolate(pixels, wanted[1:], mode="bilinear", antialias=True)
    inputs = {**batch.inputs, "pixel_values": larger.expand(-1, channels, -1, -1).contiguous()}
    return replace(batch, inputs=inputs, about=batch.about | {"enlarged": list(wanted)})


def task_of(name: str) -> Task:
    """A data task as the map makes it: needles are shorter than the task's default. Raises ValueError if it is none."""
    maker = load(f"data.{name}")(**SIZES.get(name, (0, {}))[1])
    if not isinstance(maker, Task):
        raise ValueError(f"data.{name} is not a task. `headwise ls data` lists the tasks.")
    return maker


def _method(name: str) -> HeadMethod:
    method = load(name if "." in name else f"heads.{name}")()
    if not isinstance(method, HeadMethod):
        raise ValueError(f"{name} is not a method of the heads room, so it gives heads no score.")
    return method


def _same(about: dict[str, Any], wanted: dict[str, Any]) -> bool:
    keys = ("method", "task", "fingerprint", "dtype", "nulls")
    return json.dumps([about.get(k) for k in keys], default=str) == json.dumps([wanted[k] for k in keys], default=str)


def _ability(model: PreTrainedModel, batch: Batch) -> dict[str, float]:
    """How well the model does a task: answer log-probability in nats on clean and corrupt prompts, and accuracy."""
    clean, corrupt, right = [], [], []
    for part in batch.to(model.device).chunks(8):
        with torch.no_grad(), fast_matmul(model):
            logits = answer_logits(model, part)
            clean.append(logprob(logits, part))
            right.append(correct(logits, part))
            if part.corrupt is not None:
                corrupt.append(logprob(answer_logits(model, part, part.corrupt), part))
    nan = float("nan")
    return {
        "n": len(batch),
        "accuracy": round(float(torch.cat(right).mean()), 4),
        "clean": round(float(torch.cat(clean).mean()), 4),
        "corrupt": round(float(torch.cat(corrupt).mean()), 4) if corrupt else nan,
    }
