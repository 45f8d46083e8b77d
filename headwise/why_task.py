"""Why a model can do a task: the smallest graph that alone does it, measured on prompts that did not choose it.

Only prompts that the model gets right are looked at. The first half of them chooses the graph, the other half says what
it is worth, so that nothing flatters it.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from headwise.graph import Graph
from headwise.method import Method
from headwise.models import name_of
from headwise.paths import prepare
from headwise.score import provenance
from headwise.task import Batch, Task, logit_diff, sequence_logprob, solved
from headwise.why import explaining, told, weighed
from headwise.worth import Appraisal, Worth

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST = 4


@dataclass(frozen=True)
class TaskReason:
    """The answer to "why" of a whole task.

    Attributes:
        task: its name, as in "ioi", or "pairs".
        metric: what was measured: "logit difference", or "log-probability of the answer" where there is no foil, or an
            answer is several tokens.
        graph: the edges, with their weights on prompts that had no say; the tokens of a prompt are one place, embed.
        batch: the prompts that chose it; held: the others, on which it was measured.
        chosen: the share that it does alone on the prompts that chose it.
        worth: what it explains on the others.
    """

    task: str
    metric: str
    graph: Graph
    batch: Batch
    held: Batch
    chosen: float
    worth: Worth
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A name for its graph in an atlas; prompts of one's own have a few digits of their file's digest."""
        digest = str((self.about.get("task") or {}).get("sha256", ""))[:6]
        return "-".join(filter(None, ["why", self.task.replace("_", "-"), digest]))

    def tested(self) -> str:
        """Where the figures come from, in one sentence."""
        return (
            f"That is on {len(self.held)} prompts that had no say in choosing it; on the {len(self.batch)} that did, "
            f"it does {self.chosen:.0%} alone."
        )

    def named(self, place: str) -> str:
        """A place in words."""
        return "the tokens" if place == "embed" else place

    def kept(self) -> Graph:
        """The graph with the question and all that was measured in its provenance, as it is saved."""
        said = {key: value for key, value in self.data().items() if key not in ("nodes", "edges", "about")}
        said |= {"low": self.worth.low, "high": self.worth.high, "reasons": self.worth.reasons}
        return replace(self.graph, about={**self.about, "why": said})

    def data(self) -> dict[str, Any]:
        """The contract of `headwise why --task --json`."""
        return {
            "task": self.task,
            "prompts": [len(self.batch), len(self.held)],
            "metric": self.metric,
            "chosen": self.chosen,
            **told(self.worth, self.graph),
            "says": f"{self.worth.sentence()} {self.tested()}",
            "about": self.about,
        }


@dataclass(frozen=True)
class WhyTask(Method):
    """How the graph of a task is looked for.

    Fields:
        target: share of the difference that the graph must do alone on prompts that did not choose it; on those that
            did, half of what is missing from that to all of it is asked for as well.
        steps: gradients by which edges are ranked, and steps in which those that are kept are weighed.
        draws: random circuits of each kind that the graph must beat, 0 for no test.
        prompts: prompts that are run side by side.
    """

    target: float = 0.8
    steps: int = 5
    draws: int = 20
    prompts: int = 8
    seed: int = 0

    def ask(self, model: "PreTrainedModel", tokenizer: Any, task: Task, n: int = 16) -> TaskReason:
        """Find the graph of a task of n prompts, and measure it.

        Raises:
            ValueError: a task without corrupt prompts, prompts that this tokenizer cannot make, too few that the
                model gets right, or a model whose edges are not known.
        """
        if not hasattr(tokenizer, "encode"):
            raise ValueError(f"{name_of(model)} has no tokenizer, so a prompt cannot be read for it.")
        made = task.make(tokenizer, n, self.seed)
        name = str(made.about.get("task", "task")).removeprefix("data.")
        if "input_ids" not in made.inputs:
            raise ValueError(f"The prompts of {name} are not text; why explains what a model writes.")
        made.flipped()
        right = solved(model, made.to(model.device))
        if len(right) < LEAST:
            raise ValueError(
                f"The model gets {len(right)} of {n} prompts of {name} right; at least {LEAST} are needed, half of "
                "them to choose the graph and half to measure it."
            )
        batch, held = right.split()
        single = batch.foil is not None
        measure = logit_diff if single else sequence_logprob
        own, others = (prepare(model, part, measure, self.prompts) for part in (batch, held))
        graph, chosen = explaining(self, own, batch, (1 + self.target) / 2, self.steps)
        graph = weighed(self, others, held, graph, self.steps)
        about = {**provenance(self, model, made), "model": name_of(model)}
        appraisal = Appraisal(target=self.target, draws=self.draws, halves=0, nodes=12, largest=True, seed=self.seed)
        return TaskReason(
            task=name,
            metric="logit difference" if single else "log-probability of the answer",
            graph=replace(graph, name="why_task", about=about),
            batch=batch,
            held=held,
            chosen=chosen,
            worth=appraisal.of(others, graph, about),
            about=about,
        )
