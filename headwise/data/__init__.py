"""The data room: every file here holds one task, `make(tokenizer, n, seed) -> Batch`. Classes load on first use."""

from headwise.method import room_exports

__getattr__, __dir__, __all__ = room_exports(__name__, __file__)
