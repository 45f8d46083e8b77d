"""Plain sentences made from word lists, by seed: filler for needles and text without any trick. Nothing is copied."""

import random
from collections.abc import Iterator

PEOPLE = (
    "the gardener",
    "the old sailor",
    "a young teacher",
    "the baker",
    "her neighbour",
    "the carpenter",
    "a quiet student",
    "the miller",
    "his sister",
    "the painter",
    "a tired driver",
    "the shepherd",
)
VERBS = (
    "carried",
    "found",
    "painted",
    "repaired",
    "watched",
    "remembered",
    "sold",
    "cleaned",
    "moved",
    "described",
    "borrowed",
    "noticed",
)
KINDS = ("small", "wooden", "heavy", "broken", "yellow", "strange", "warm", "empty", "narrow", "bright")
THINGS = (
    "boat",
    "basket",
    "window",
    "ladder",
    "blanket",
    "cart",
    "lantern",
    "bench",
    "kettle",
    "fence",
    "barrel",
    "mirror",
)
WHERE = (
    "near the river",
    "behind the mill",
    "on the hill",
    "under the bridge",
    "in the market",
    "beside the road",
    "at the harbour",
    "inside the barn",
)
WHEN = ("in the morning", "before the rain", "after supper", "during the storm", "late in spring", "on a cold evening")
LINKS = ("because", "although", "while", "until")
STATES = (
    "the weather was turning",
    "nobody had asked for it",
    "the children were asleep",
    "the light was fading",
    "there was little time",
    "the snow had melted",
    "the bells were ringing",
    "the harvest was late",
)


def sentence(draw: random.Random) -> str:
    """One sentence; the lists allow several hundred thousand."""
    who, verb, kind, thing = draw.choice(PEOPLE), draw.choice(VERBS), draw.choice(KINDS), draw.choice(THINGS)
    where, when = draw.choice(WHERE), draw.choice(WHEN)
    article = "an" if kind[0] in "aeiou" else "a"
    shape = draw.randrange(4)
    if shape == 0:
        said = f"{who} {verb} {article} {kind} {thing} {where}"
    elif shape == 1:
        said = f"{when}, {who} {verb} the {kind} {thing}"
    elif shape == 2:
        said = f"{who} {verb} the {thing} {where} {draw.choice(LINKS)} {draw.choice(STATES)}"
    else:
        said = f"{where} stood {article} {kind} {thing}, and {who} {verb} it {when}"
    return said[0].upper() + said[1:] + "."


def sentences(seed: str) -> Iterator[str]:
    """Endless sentences; the same seed gives the same ones, and no sentence comes twice within 200."""
    draw = random.Random(seed)
    recent: list[str] = []
    while True:
        said = sentence(draw)
        if said not in recent:
            recent = [*recent[-199:], said]
            yield said
