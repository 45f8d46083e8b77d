"""How queries mix values: attention that computes less, or is trained to look back otherwise. A method is a file."""

from headwise.method import room_exports

__getattr__, __dir__, __all__ = room_exports(__name__, __file__)
