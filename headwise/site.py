"""The address of a place in a transformer: "L5.H1.z", "L9.H6@-1", "L3.N1021", "L*.mlp"."""

import difflib
import re
from dataclasses import dataclass, replace

HEAD_KINDS = ("q", "k", "v", "q_pre", "k_pre", "scores", "pattern", "z")
LAYER_KINDS = ("resid_pre", "resid_mid", "resid_post", "attn", "mlp", "neurons")
KINDS = HEAD_KINDS + LAYER_KINDS
ON_KV_HEADS = ("k", "v", "k_pre")
STACKS = ("", "enc", "cross")

_ADDRESS = re.compile(
    r"^(?:(?P<stack>enc|cross)\.)?(?:L(?P<layer>\d+|\*)(?:\.(?P<unit>[HGN])(?P<index>\d+|\*))?\.?)?"
    r"(?P<kind>[a-z_]+)?(?:@(?P<position>-?\d+))?$"
)


@dataclass(frozen=True)
class Site:
    """A place: a stack, a layer (None = all), a kind of value, and perhaps one head, KV head or neuron, one position.

    Attributes:
        layer: layer number, or None for every layer.
        kind: one of `KINDS`.
        index: head (query head; KV head for k, v, k_pre) or neuron number, or None for all of them.
        position: column of the sequence, negative from the end of the prompt, or None for all.
        stack: "" the main stack, "enc" the encoder of an encoder-decoder, "cross" its cross-attention.
    """

    layer: int | None
    kind: str
    index: int | None = None
    position: int | None = None
    stack: str = ""

    @classmethod
    def parse(cls, text: "str | Site") -> "Site":
        """Read an address. A head without a kind means its z, a neuron its activation, a layer its resid_post.

        Raises:
            ValueError: the text is not an address, or names a kind that does not exist.
        """
        if isinstance(text, Site):
            return text
        match = _ADDRESS.match(text.strip())
        if not match or not text.strip():
            raise ValueError(f"{text!r} is not a site. Write for example L5.H1.z, L9.H6@-1, L3.N1021, L*.mlp, pattern.")
        part = match.groupdict()
        unit, kind = part["unit"], part["kind"]
        if kind is not None and kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{kind!r} in {text!r} is not a kind of site: {', '.join(KINDS)}.{hint}")
        if kind is None:
            kind = {"H": "z", "G": "v", "N": "neurons", None: "resid_post"}[unit]
        if (unit in ("H", "G") and kind not in HEAD_KINDS) or (unit == "N" and kind != "neurons"):
            raise ValueError(f"{text!r}: {kind} does not belong to a {'neuron' if unit == 'N' else 'head'}.")
        if (unit == "H" and kind in ON_KV_HEADS) or (unit == "G" and kind not in ON_KV_HEADS):
            where = "KV heads (L5.G0.v)" if kind in ON_KV_HEADS else "query heads (L5.H1.z)"
            raise ValueError(f"{text!r}: {kind} lives on {where}.")
        number = {None: None, "*": None}
        return cls(
            layer=number[part["layer"]] if part["layer"] in number else int(part["layer"]),
            kind=kind,
            index=number[part["index"]] if part["index"] in number else int(part["index"]),
            position=None if part["position"] is None else int(part["position"]),
            stack=part["stack"] or "",
        )

    def __str__(self) -> str:
        stack = f"{self.stack}." if self.stack else ""
        letter = "N" if self.kind == "neurons" else "G" if self.kind in ON_KV_HEADS else "H"
        unit = "" if self.index is None else f".{letter}{self.index}"
        at = "" if self.position is None else f"@{self.position}"
        return f"{stack}L{'*' if self.layer is None else self.layer}{unit}.{self.kind}{at}"

    def at_layer(self, layer: int) -> "Site":
        """The same site in one given layer."""
        return replace(self, layer=layer)

    @property
    def whole(self) -> "Site":
        """The same site with all its heads and positions."""
        return replace(self, index=None, position=None)


def time_axis(site: Site) -> int:
    """The axis of a site's value that runs over columns (query columns for scores and pattern)."""
    return 2 if site.kind in HEAD_KINDS and site.kind != "z" else 1


def head_axis(site: Site) -> int | None:
    """The axis of a site's value that runs over heads or neurons, None for the residual stream."""
    if site.kind in ("z", "neurons"):
        return 2
    return 1 if site.kind in HEAD_KINDS else None


_UNIT = re.compile(
    r"^(?P<stack>enc\.|cross\.)?L(?P<layer>\d+)(?:\.(?P<unit>[HGN])(?P<index>\d+)|\.(?P<sub>attn|mlp))?$"
)


@dataclass(frozen=True, order=True)
class Unit:
    """What a number is about: head "L5.H1", KV head "L5.G0", neuron "L3.N7", sublayer "L5.mlp", layer "L5"."""

    stack: str
    layer: int
    letter: str
    index: int

    @classmethod
    def parse(cls, text: str) -> "Unit":
        """Read a unit's name. Raises ValueError with an example when the text is none."""
        match = _UNIT.match(text.strip())
        if not match:
            raise ValueError(
                f"{text!r} is not a unit. Write for example L5.H1 (head), L5.G0 (KV head), L3.N7, L5.mlp, L5."
            )
        stack = (match["stack"] or "").rstrip(".")
        return cls(stack, int(match["layer"]), match["unit"] or match["sub"] or "", int(match["index"] or 0))

    def __str__(self) -> str:
        stack = f"{self.stack}." if self.stack else ""
        tail = "" if not self.letter else f".{self.letter}{self.index if len(self.letter) == 1 else ''}"
        return f"{stack}L{self.layer}{tail}"


def head(layer: int, index: int, stack: str = "") -> str:
    """The name of a query head, `head(5, 1) == "L5.H1"`."""
    return str(Unit(stack, layer, "H", index))
