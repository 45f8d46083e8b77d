"""A graph of what carries a behaviour: weighed edges between tokens, heads, MLPs and logits. A method is a file."""

from headwise.method import room_exports

__getattr__, __dir__, __all__ = room_exports(__name__, __file__)
