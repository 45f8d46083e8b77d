"""Which keys and values exist: what each KV head of a cache remembers. A method is a file."""

from headwise.method import room_exports

__getattr__, __dir__, __all__ = room_exports(__name__, __file__)
