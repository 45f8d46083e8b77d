"""Functions of Python's own library with what their authors say of them: pairs of texts that are on every machine."""

import ast
import random
import sysconfig
from functools import cache
from pathlib import Path


@cache
def documented(seed: int = 0) -> tuple[tuple[str, str], ...]:
    """(first sentence of the docstring, the code without it) of functions, in an order drawn by seed, each once.

    The files at the top of the library are read, not run. Versions of Python differ a little in them.

    Raises:
        ValueError: this Python carries no source of its library.
    """
    found: dict[str, str] = {}
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (said := ast.get_docstring(node)) and len(node.body) > 1:
                sentence = " ".join(said.split("\n\n")[0].split())
                node.body, node.decorator_list = node.body[1:], []
                found.setdefault(sentence, ast.unparse(node))
    pairs = [(sentence, code) for sentence, code in sorted(found.items()) if 20 <= len(sentence) <= 300]
    if not pairs:
        raise ValueError("This Python carries no source of its library, so there are no functions to be read.")
    random.Random(f"documented {seed}").shuffle(pairs)
    return tuple(pairs)
