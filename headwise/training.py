"""Train a small model on a lesson, with edits that hold parts of it, a tape of what every head does, and resuming.

    model = TinyConfig(**lesson.config(layers=2, heads=8))
    run = train(model, lesson, Training(steps=1800, lr=2e-4), [Edit("L1.pattern", pattern("match"))], seed=5)
    run.tape.time_to("loss", below=0.277)

The same model shape, lesson, settings, edits and seed give the same curve bit for bit on one machine. With a folder, a
run that was killed goes on from its last state and ends with the same curve.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headwise import resume
from headwise.asked import asked
from headwise.atlas import Atlas
from headwise.convert import quiet
from headwise.edits import Edit, Scene, holding
from headwise.lesson import Lesson, generator
from headwise.measuring import Look, Measured, look, measured
from headwise.models import fingerprint
from headwise.optimising import Training
from headwise.progress import hidden
from headwise.resets import Reset, Switch
from headwise.resume import State
from headwise.score import Score
from headwise.tape import Tape
from headwise.task import Batch, answer_logits
from headwise.tiny import TinyConfig
from headwise.writing import write_aside

# So many batches are drawn at once: drawing has a fixed cost.
BLOCK = 16

Change = Edit | Reset | Switch


@dataclass
class Run:
    """A trained model and its history.

    Attributes:
        model: as it is at the end, in evaluation mode.
        tape: what was measured, at step 0 and then every `measure_every` steps.
        losses: of every update, under its edits.
        step: updates made.
        folder: state.safetensors, tape.parquet, run.json, checkpoints/step=<k>/ and atlas/; None where nothing is kept.
        done: whether it has come to its end. What a `watch` is shown on the way has not, and its model still trains.
    """

    model: PreTrainedModel
    lesson: Lesson
    training: Training
    tape: Tape
    seed: int = 0
    losses: list[float] = field(default_factory=list)
    step: int = 0
    folder: Path | None = None
    done: bool = True

    @property
    def atlas(self) -> Atlas:
        """Scores of every checkpoint, those of the last also as step 0. Raises ValueError without a folder."""
        if self.folder is None:
            raise ValueError("This run kept nothing; give train() a folder.")
        return Atlas(self.folder / "atlas")


Watch = Callable[[Run], None]


def train(
    model: "PreTrainedModel | TinyConfig",
    lesson: Lesson,
    training: Training | None = None,
    edits: "Sequence[Change]" = (),
    *,
    seed: int = 0,
    folder: "Path | str | None" = None,
    progress: "Mapping[str, Sequence[Edit]] | None" = None,
    watch: "Watch | None" = None,
) -> Run:
    """Teach a lesson.

    Args:
        model: a config, from which a fresh model is built with `seed`; or a model, which is changed.
        lesson: what it is taught.
        training: for how long and how.
        edits: what is done to the model meanwhile, each on its own schedule `when`: `Edit` holds a value at a site,
            `Reset` draws a parameter anew, `Switch` teaches another lesson.
        seed: of weights and of prompts; prompts do not depend on edits, so that runs of one seed are paired.
        folder: where state, tape, checkpoints and an atlas are kept. A run that is there already goes on.
        progress: edits by name, under which the loss is measured too: what if only this part were perfect?
        watch: shown the run after every measurement and at the end; it must not change it.

    Raises:
        ValueError: the model does not fit the lesson, or the folder holds another run.
    """
    training = training or Training()
    built = model.build(seed) if isinstance(model, TinyConfig) else model
    place = None if folder is None else Path(folder)
    loop = _Loop(built, lesson, training, list(edits), seed, place, progress or {}, watch)
    threads = torch.get_num_threads()
    torch.set_num_threads(training.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return loop.run()
    finally:
        torch.set_num_threads(threads)


def measure(
    model: PreTrainedModel,
    lesson: Lesson,
    edits: "Sequence[Edit]" = (),
    *,
    rows: int = 256,
    seed: int = 0,
    step: int = 0,
) -> dict[str, float]:
    """Loss, accuracy and the lesson's other numbers under edits, on the prompts that a run of this seed measures on.

    With the edits of a clamped run, on a model that was trained without them, this is their progress measure.
    """
    batch = _prompts(lesson, rows, seed)
    values = measured(model, batch, lesson, edits, Scene(lesson, batch, step)).numbers
    return {name: float(value.mean()) for name, value in values.items()}


def _prompts(lesson: Lesson, rows: int, seed: int) -> Batch:
    return lesson.make(None, rows, seed=0x7E57_0000 + seed)


class _Loop:
    """One run while it runs."""

    def __init__(
        self,
        model: PreTrainedModel,
        lesson: Lesson,
        training: Training,
        changes: list[Change],
        seed: int,
        folder: Path | None,
        progress: "Mapping[str, Sequence[Edit]]",
        watch: "Watch | None",
    ) -> None:
        self.model, self.lesson, self.training, self.seed, self.folder = model.train(), lesson, training, seed, folder
        self.edits = [one for one in changes if isinstance(one, Edit)]
        self.resets = [one for one in changes if isinstance(one, Reset)]
        self.switches = [one for one in changes if isinstance(one, Switch)]
        self.progress = progress
        self.optimiser = training.make(model)
        self.state = State(0, [], Tape(), {})
        self.splits = {split: _prompts(lesson.on(split), training.rows, seed) for split in ("train", *lesson.tests)}
        self.block: tuple[Any, Batch] | None = None
        self.asked = asked(model, lesson, training, changes, seed, progress)
        self.watch = watch

    def run(self) -> Run:
        self._start()
        with tqdm(
            total=self.training.steps,
            initial=self.state.step,
            desc=f"{type(self.lesson).__name__} seed {self.seed}",
            disable=hidden(),
            leave=False,
        ) as bar:
            try:
                self._steps(bar)
            finally:
                self._leave()
        rows = self.state.tape.rows
        if not rows or rows[-1][0] != self.state.step:
            self._measure()
        if self.folder:
            self._keep(last=True)
        self.model.eval()
        found = self._so_far(done=True)
        if self.watch:
            self.watch(found)
        return found

    def _steps(self, bar: tqdm) -> None:
        first, tape = self.state.step, self.state.tape
        for step in range(first, self.training.steps):
            if self.folder and step > first and step % self.training.checkpoint_every == 0:
                self._keep()
            if step % self.training.measure_every == 0:
                self._measure()
                bar.set_postfix(loss=f"{tape.last('loss'):.3f}")
                if self.training.until is not None and self.training.until.on(step, tape):
                    break
            self._update(step)
            bar.update()

    def _so_far(self, done: bool = False) -> Run:
        state = self.state
        return Run(
            self.model, self.lesson, self.training, state.tape, self.seed, state.losses, state.step, self.folder, done
        )

    def _start(self) -> None:
        self._held: tuple[list[Edit], contextlib.ExitStack, Scene] = ([], contextlib.ExitStack(), Scene())
        for reset in self.resets:
            self.state.spreads |= reset.spreads(self.model)
        if self.folder is None:
            return
        if (self.folder / "state.safetensors").exists():
            self.state = resume.load(self.folder / "state.safetensors", self.model, self.optimiser, self.asked)
            return
        text = json.dumps(self.asked, indent=2) + "\n"
        write_aside(self.folder / "run.json", lambda p: p.write_text(text, encoding="utf-8"))
        self._save_model()

    # One step

    def _update(self, step: int) -> None:
        draw = generator(self.seed, 3, step)
        for reset in self.resets:
            if reset.when.on(step, self.state.tape):
                reset.apply(self.model, self.optimiser, self.state.spreads, draw)
        lesson = self._lesson(step)
        batch = self._batch(lesson, step)
        scene = self._hold(self._active(step))
        scene.lesson, scene.batch, scene.step = lesson, batch, step
        loss = lesson.loss(answer_logits(self.model, batch), batch).mean()
        self.optimiser.zero_grad()
        loss.backward()
        if self.training.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = self.training.rate(step)
        self.optimiser.step()
        self.state.losses.append(loss.item())
        self.state.step = step + 1

    def _active(self, step: int) -> list[Edit]:
        return [one for one in self.edits if one.when.on(step, self.state.tape)]

    def _lesson(self, step: int) -> Lesson:
        on = [one.lesson for one in self.switches if one.when.on(step, self.state.tape)]
        return on[-1] if on else self.lesson

    def _batch(self, lesson: Lesson, step: int) -> Batch:
        """The prompts of a step, which depend on lesson, seed and step alone."""
        size, key = self.training.batch, (lesson, step // BLOCK)
        if self.block is None or self.block[0] != key:
            self.block = key, lesson.draw(size * BLOCK, generator(self.seed, 2, step // BLOCK)).to(self.model.device)
        start = size * (step % BLOCK)
        return self.block[1].take(slice(start, start + size))

    def _hold(self, wanted: list[Edit]) -> Scene:
        """Hold these edits from now on; entered anew only where they change."""
        now, stack, scene = self._held
        if [id(one) for one in now] == [id(one) for one in wanted] and (wanted or not now):
            return scene
        stack.close()
        stack, scene = contextlib.ExitStack(), Scene()
        if wanted:
            stack.enter_context(holding(self.model, wanted, scene))
        self._held = wanted, stack, scene
        return scene

    def _leave(self) -> None:
        self._held[1].close()
        self._held = [], contextlib.ExitStack(), Scene()

    # What is measured and kept

    def _measure(self) -> None:
        """Every split under the edits of this step, and the training split under each progress measure."""
        self._leave()
        step, active = self.state.step, self._active(self.state.step)
        asked: list[tuple[str, str, Sequence[Edit]]] = [(split, split, active) for split in self.splits]
        asked += [(f"train | {name}", "train", held) for name, held in self.progress.items()]
        for label, split, held in asked:
            batch = self.splits[split].to(self.model.device)
            lesson = self.lesson.on(split)
            found = measured(self.model, batch, lesson, held, Scene(lesson, batch, step))
            self._note(step, label, found)
        if self.watch:
            self.watch(self._so_far())

    def _note(self, step: int, label: str, found: Measured) -> None:
        for name, value in found.numbers.items():
            self.state.tape.add(step, name, label, "", float(value.mean()))
        for name, heads in found.heads.items():
            for unit, value in heads.items():
                self.state.tape.add(step, name, label, unit, float(value.mean()))

    def _keep(self, last: bool = False) -> None:
        """State, model, tape and atlas of this step. The state comes last: what it promises is there."""
        self._leave()
        folder, step = cast(Path, self.folder), self.state.step
        source = self._save_model()
        about = {"seed": self.seed, "lesson": type(self.lesson).__name__, "done": last}
        self.state.tape.save(folder / "tape.parquet", about)
        scores = self._scores()
        if step:
            atlas = Atlas.of(self.model, folder / "atlas", step=step)
            for score in scores:
                atlas.add(Score(score.name, score.table, score.kind, score.evidence, score.about, step))
            if last:
                atlas.note(fingerprint=fingerprint(self.model), source=str(source))
                for score in scores:
                    atlas.add(score)
        resume.save(folder / "state.safetensors", self.model, self.optimiser, self.state, self.asked)

    def _save_model(self) -> Path:
        target = cast(Path, self.folder) / "checkpoints" / f"step={self.state.step}"
        with quiet():
            self.model.save_pretrained(target)
        return target

    def _scores(self) -> list[Score]:
        batch = self.splits["train"].to(self.model.device)
        with _eval(self.model), torch.no_grad():
            found = look(self.model, batch, self.lesson)
        return [
            Score.of_units(Look(name), self.model, batch, values, name=name, evidence="seen")
            for name, values in found.items()
        ]


@contextmanager
def _eval(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
