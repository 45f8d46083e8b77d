"""What several test files begin with: tiny models in memory and on disk."""

import pytest
from caches import built_once
from command_line import tiny_decoder, tiny_encoder
from families import FAMILIES
from naive_codes import where_torchao_is_missing


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build()


@pytest.fixture
def inputs():
    return FAMILIES["llama"].inputs()


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    """The folder of a tiny decoder with its tokenizer."""
    return tiny_decoder(tmp_path_factory.mktemp("models") / "tiny-decoder")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """The folder of a tiny encoder with its tokenizer."""
    return tiny_encoder(tmp_path_factory.mktemp("models") / "tiny-encoder")


@pytest.fixture(scope="module")
def models():
    """Models of the cache tests by name, each built once a file."""
    return built_once()


@pytest.fixture(scope="module")
def codes():
    """Caches of few bits work where torchao is not installed, too."""
    with where_torchao_is_missing():
        yield
