"""A trained model and its history: experiments that hold circuits while they form. An experiment is a file."""

from headwise.method import room_exports

__getattr__, __dir__, __all__ = room_exports(__name__, __file__)
