"""embed(): one text or many, by the real model, with sentence-transformers as the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from psycopg import errors

from models_for_tests import packaged_minilm
from support.rigging import Rig, scalar
from support.server import Connection, Server
from support.stubs import add_stub

pytest_plugins = ["support.rig"]

Oracle = Callable[[str], NDArray[Any]]

TEXTS = [
    "A transaction either happens completely or not at all.",
    "vacuum",
    "Schnell läuft der Fuchs über die Wiese; 狐は速い。",
    "select 1; -- drop table students",
    "a long text that says the same thing again, " * 80,
]
HOSTILE = {
    "emoji": "🦊👩‍👩‍👧‍👦🏳️‍🌈 " * 20,
    "right-to-left": "שלום עולם \u202e مرحبا بالعالم \u200f",
    "controls": "".join(chr(c) for c in range(1, 32)) + "\x7f\x80\x9f text",
    "combining": "Z̸̢͖͖̥̩̓͒a̸͓͝l̸g̴o̵ " + "a" + "\u0301" * 500,
    "surrogates' edge": "\ud7ff\ue000\uffff\U0010ffff text",
    "one word of 100,000 letters": "x" * 100_000,
    "quotes": "' \" \\ $$ $1 %s %% {} \\N \\. \r\n ☃",
    "special tokens": "[CLS] [SEP] [PAD] [MASK] [UNK] </s> <s>",
    "byte order mark": "\ufeff text \u2028 \u00a0",
}


@pytest.fixture(scope="module")
def real(server: Server) -> Iterator[Connection]:
    """One session with the real model for the whole module."""
    with server.connect() as connection:
        yield connection


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    from sentence_transformers import SentenceTransformer

    transformer = SentenceTransformer(str(packaged_minilm()), device="cpu")

    def encode(text: str) -> NDArray[Any]:
        return np.asarray(transformer.encode([text])[0], dtype=np.float32)

    return encode


def numbers(vector: str) -> NDArray[Any]:
    return np.array(json.loads(vector), dtype=np.float32)


def embed(connection: Connection, text: str | None) -> NDArray[Any]:
    return numbers(scalar(connection, "select embed(%s::text)::text", text))


# --- the real model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:12])
def test_equals_sentence_transformers(real: Connection, oracle: Oracle, text: str) -> None:
    assert np.abs(embed(real, text) - oracle(text)).max() < 1e-5


def test_many_texts_equal_sentence_transformers_in_order(real: Connection, oracle: Oracle) -> None:
    found = scalar(real, "select embed(%s::text[])::text[]", TEXTS * 2)
    assert len(found) == 10
    for vector, text in zip(found, TEXTS * 2, strict=True):
        assert np.abs(numbers(vector) - oracle(text)).max() < 1e-5


def test_list_without_its_type(real: Connection) -> None:
    """As psycopg and node send it; embed() would take its literal for one text."""
    vectors = scalar(real, "select embed_texts(%s)::text[]", ["one", None, "two"])
    assert vectors == scalar(real, "select embed(%s::text[])::text[]", ["one", None, "two"])
    assert [vector is None for vector in vectors] == [False, True, False]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts(real: Connection, oracle: Oracle, name: str) -> None:
    assert np.abs(embed(real, HOSTILE[name]) - oracle(HOSTILE[name])).max() < 1e-5


@pytest.mark.parametrize("blank", ["", " ", "\n\t "])
def test_blank_texts_have_a_vector_here(real: Connection, oracle: Oracle, blank: str) -> None:
    assert np.abs(embed(real, blank) - oracle(blank)).max() < 1e-5


def test_a_megabyte(real: Connection, oracle: Oracle) -> None:
    text = "word " * 210_000
    assert np.abs(embed(real, text) - oracle(text[:10_000])).max() < 1e-5


@pytest.mark.parametrize("before", [" " * 16_384, "\n" * 200_000, "a" * 20_000 + " "], ids=["spaces", "lines", "word"])
def test_what_stands_far_behind_is_read_if_little_stands_before_it(real: Connection, before: str) -> None:
    short = embed(real, before[-200:] + "giraffe in the garden")
    assert np.abs(embed(real, before + "giraffe in the garden") - short).max() < 1e-5


def test_same_text_same_vector_whatever_stands_beside_it(real: Connection) -> None:
    alone = embed(real, TEXTS[0])
    beside = numbers(scalar(real, "select (embed(%s::text[]))[4]::text", [TEXTS[4], TEXTS[1], TEXTS[2], TEXTS[0]]))
    assert np.abs(alone - beside).max() < 1e-6


def test_meaning(real: Connection) -> None:
    near, far = (
        scalar(real, "select embed('How do I get back disk space?') <=> embed(%s::text)", text)
        for text in ("VACUUM reclaims storage occupied by dead tuples.", "The orchestra played until midnight.")
    )
    assert near < far - 0.2


# --- forms and errors, by any model ----------------------------------------------------------------------------


@pytest.fixture
def stub(rig: Rig) -> Iterator[Connection]:
    with rig.server.connect() as connection:
        yield connection


def test_null_in_null_out(stub: Connection, rig: Rig) -> None:
    assert scalar(stub, "select embed(null::text)") is None
    assert scalar(stub, "select embed(null::text[])") is None
    assert scalar(stub, "select embed('{}'::text[])::text[]") == []
    assert scalar(stub, "select embed(array[null, null]::text[])::text[]") == [None, None]
    assert rig.encodings() == []


def test_nulls_keep_their_places(stub: Connection) -> None:
    found = scalar(stub, "select embed(array[null, 'a', null, 'b', 'a', null])::text[]")
    assert [vector is None for vector in found] == [True, False, True, False, False, True]
    assert found[1] == found[4] == scalar(stub, "select embed('a')")


def test_one_pass_for_many_texts(stub: Connection, rig: Rig) -> None:
    scalar(stub, "select embed(array(select 'text ' || g from generate_series(1, 24) g))")
    assert [texts for _, texts in rig.encodings()] == [8, 8, 8]


def test_other_lower_bounds(stub: Connection) -> None:
    found = scalar(stub, "select embed('[5:6]={a,b}'::text[])::text[]")
    assert found == [scalar(stub, "select embed('a')"), scalar(stub, "select embed('b')")]


def test_nested_arrays_are_refused(stub: Connection) -> None:
    with pytest.raises(errors.ArraySubscriptError, match="more than one dimension"):
        stub.execute("select embed(array[array['a', 'b'], array['c', 'd']])")


def test_prompts(stub: Connection) -> None:
    assert scalar(stub, "select embed('a', prompt => 'query') = embed('query: a')")
    assert scalar(stub, "select embed('a', prompt => 'document') = embed('a')")
    assert scalar(stub, "select (embed(array['a'], prompt => 'query'))[1] = embed('query: a')")


def test_unknown_prompt(stub: Connection) -> None:
    with pytest.raises(errors.InvalidParameterValue, match="no prompt named poem") as caught:
        stub.execute("select embed('a', prompt => 'poem')")
    assert caught.value.diag.message_hint == "Its prompts are: document, query."


@pytest.mark.parametrize(
    "name", ["nobody", "", "../stub-384", "/etc", "stub-384/", ".", "a b", "x" * 300, "Stub-384\n"]
)
def test_unknown_models(stub: Connection, name: str) -> None:
    with pytest.raises(errors.InvalidParameterValue) as caught:
        stub.execute("select embed('a', %s)", [name])
    assert caught.value.diag.message_hint


def test_models_by_name(stub: Connection) -> None:
    assert scalar(stub, "select vector_dims(embed('a'))") == 384
    assert scalar(stub, "select vector_dims(embed('a', 'stub-16'))") == 16
    assert scalar(stub, "select embed('a', 'stub-other') = embed('a', 'stub-384')") is False


def test_text_that_fails_is_named_by_its_place(stub: Connection) -> None:
    with pytest.raises(errors.ExternalRoutineException, match="text 2 could not be embedded: the encoder raised"):
        stub.execute("select embed(array['a', 'raiseword', 'b'])")
    with pytest.raises(errors.OutOfMemory, match="text 1 could not be embedded"):
        stub.execute("select embed('hugeword')")


def test_place_counts_nulls(stub: Connection) -> None:
    with pytest.raises(errors.ExternalRoutineException, match="text 3 could not be embedded"):
        stub.execute("select embed(array[null, 'a', 'raiseword'])")


def test_broken_encoder(stub: Connection, rig: Rig) -> None:
    if not (rig.models / "stub-broken").exists():
        add_stub(rig.models, "stub-broken")
    with pytest.raises(errors.SystemError, match="plain word"):
        stub.execute("select embed('a', 'stub-broken')")


def test_in_a_transaction_and_a_function(stub: Connection) -> None:
    stub.execute("begin isolation level serializable read only")
    assert scalar(stub, "select count(embed('text ' || g)) from generate_series(1, 3) g") == 3
    stub.execute("rollback")


def test_cancel_goes_through(stub: Connection, rig: Rig) -> None:
    rig.pace(0.2)
    stub.execute("set statement_timeout = '300ms'")
    with pytest.raises(errors.QueryCanceled):
        stub.execute("select embed(array(select 'text ' || g from generate_series(1, 200) g))")


def test_context_of_an_error_is_short(stub: Connection) -> None:
    """None of its lines is Python's, however deep it was."""
    with pytest.raises(errors.InvalidParameterValue) as caught:
        stub.execute("select embed('text', 'no-such')")
    context = str(caught.value.diag.context)
    assert len(context.splitlines()) == 3, context
