"""Transformers: State-of-the-Art Natural Language Processing. Wolf et al., 2020. arXiv:1910.03771

What is changed here is only where keys go: transformers' `DynamicCache` copies all of them at each token.
"""

from dataclasses import dataclass

from headwise.kv_cache import CacheMethod
from headwise.store import Full, Store


@dataclass(frozen=True)
class Preallocated(CacheMethod):
    """Every key and value, written in place into memory reserved ahead; drops nothing.

    Where the final length is known (`generate` says it) buffers never grow; else they grow by a quarter.
    """

    def store(self, reserve: int = 0) -> Store:
        """A buffer that holds all tokens."""
        return Full(reserve)
