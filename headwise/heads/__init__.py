"""A number per unit: what each head attends to, reads, writes, and what is lost without it. A method is a file."""

from headwise.method import room_exports

__getattr__, __dir__, __all__ = room_exports(__name__, __file__)
