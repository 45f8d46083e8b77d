"""How a cache forgets the tokens of a draft that were refused, whatever it is made of."""
