"""Which token comes next: drafts that are verified, exits, samplers. A method is a file."""

from headwise.method import room_exports

__getattr__, __dir__, __all__ = room_exports(__name__, __file__)
