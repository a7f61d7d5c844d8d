from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from weakref import ReferenceType, ref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoembed.encoding import batching
from autoembed.encoding.batching import Failure, Outcome, Vector, encode_all
from autoembed.errors import EncoderBroken, OutOfMemory
from unit.fakes import FakeEncoder, vector_of

SECRET = "a secret nobody may see"


def nothing() -> None:
    pass


def run(encoder: FakeEncoder, texts: Sequence[str], prompt: str = "") -> list[Outcome]:
    return encode_all(encoder, texts, prompt=prompt, checkpoint=nothing)


def refuse(
    *bad: str, error: Callable[[], BaseException] = lambda: ValueError(SECRET)
) -> Callable[[Sequence[str]], None]:
    def fault(texts: Sequence[str]) -> None:
        if set(bad) & set(texts):
            raise error()

    return fault


@given(st.lists(st.text(max_size=150), max_size=60))
def test_every_text_gets_its_own_vector_in_order(texts: list[str]) -> None:
    encoder = FakeEncoder()
    outcomes = run(encoder, texts)
    assert len(outcomes) == len(texts)
    for text, outcome in zip(texts, outcomes, strict=True):
        assert isinstance(outcome, Vector)
        assert np.array_equal(outcome.values, vector_of(text))
        assert (outcome.tokens, outcome.truncated) == (len(text), len(text) > 100)


@given(st.lists(st.integers(0, 300), max_size=60))
def test_micro_batches_keep_to_texts_and_padded_tokens(lengths: list[int]) -> None:
    encoder = FakeEncoder()
    run(encoder, ["x" * length for length in lengths])
    for batch in encoder.batches:
        longest = min(100, max(map(len, batch)))
        assert len(batch) <= 8
        assert len(batch) == 1 or len(batch) * longest <= encoder.token_budget


def test_a_given_budget_is_kept() -> None:
    encoder = FakeEncoder()
    encode_all(encoder, [f"{number:010}" for number in range(12)], prompt="", checkpoint=nothing, token_budget=30)
    assert [len(batch) for batch in encoder.batches] == [3, 3, 3, 3]


def test_equal_texts_are_encoded_once() -> None:
    encoder = FakeEncoder(fault=refuse("bad"))
    outcomes = run(encoder, ["one", "bad", "two", "one", "bad", "one"])
    assert [type(outcome) for outcome in outcomes] == [Vector, Failure, Vector, Vector, Failure, Vector]
    assert outcomes[0] is outcomes[3] is outcomes[5]
    encoder = FakeEncoder()
    run(encoder, ["one", "two", "one", "one"])
    assert encoder.batches == [["one", "two"]]


def test_no_texts_no_work() -> None:
    encoder = FakeEncoder()
    assert run(encoder, []) == []
    assert encoder.batches == []


def test_the_prompt_counts_and_reaches_the_encoder() -> None:
    (outcome,) = run(FakeEncoder(), ["text"], prompt="query: ")
    assert isinstance(outcome, Vector)
    assert outcome.tokens == len("query: text")
    assert np.array_equal(outcome.values, vector_of("query: text"))


def test_bad_texts_stand_alone_and_good_ones_are_kept() -> None:
    texts = [f"text {number}" for number in range(40)]
    outcomes = run(FakeEncoder(fault=refuse("text 3", "text 17")), texts)
    failed = {texts[row]: outcome for row, outcome in enumerate(outcomes) if isinstance(outcome, Failure)}
    assert failed == {bad: Failure("encoder", "the encoder raised ValueError") for bad in ("text 3", "text 17")}


def test_no_text_in_a_failures_message() -> None:
    (outcome,) = run(FakeEncoder(fault=refuse(SECRET)), [SECRET])
    assert isinstance(outcome, Failure)
    assert SECRET not in outcome.message


def test_a_text_that_the_tokenizer_chokes_on_fails_alone() -> None:
    outcomes = run(FakeEncoder(count_fault=refuse("bad")), ["good", "bad", "better"])
    assert [type(outcome) for outcome in outcomes] == [Vector, Failure, Vector]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory."),
        RuntimeError("could not create a primitive"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_out_of_memory_halves_and_stays_small(error: Exception) -> None:
    def fault(texts: Sequence[str]) -> None:
        if len(texts) > 2:
            raise error

    encoder = FakeEncoder(fault=fault)
    outcomes = run(encoder, [f"{number:010}" for number in range(32)])
    assert all(isinstance(outcome, Vector) for outcome in outcomes)
    assert [len(batch) for batch in encoder.batches if len(batch) > 2] == [8, 4, 4]


@pytest.mark.parametrize("calls", range(2))
def test_out_of_memory_at_a_checkpoint_is_the_pass_s(calls: int) -> None:
    left = calls

    def checkpoint() -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise MemoryError

    outcomes = encode_all(FakeEncoder(), ["one", "two", "three"], prompt="", checkpoint=checkpoint)
    assert all(isinstance(outcome, Vector) for outcome in outcomes)
    assert left < 0


def test_what_failed_is_gone_before_the_next_try() -> None:
    """A traceback's frames would keep a pass's matrices."""

    class Matrix:
        pass

    kept: list[ReferenceType[Matrix]] = []

    def fault(texts: Sequence[str]) -> None:
        assert [each() for each in kept] == [None] * len(kept)
        matrix = Matrix()
        kept.append(ref(matrix))
        if len(texts) > 1:
            raise MemoryError

    assert all(isinstance(outcome, Vector) for outcome in run(FakeEncoder(fault=fault), ["one", "two"]))
    assert len(kept) == 3


def test_no_memory_at_any_checkpoint_blames_no_text() -> None:
    def checkpoint() -> None:
        raise MemoryError

    with pytest.raises(OutOfMemory):
        encode_all(FakeEncoder(), ["one", "two"], prompt="", checkpoint=checkpoint)


def test_out_of_memory_alone_is_that_texts_failure() -> None:
    outcomes = run(FakeEncoder(fault=refuse("huge", error=MemoryError)), ["huge", "small"])
    assert outcomes[0] == Failure("memory", "there is not enough memory to encode this text")
    assert isinstance(outcomes[1], Vector)


def test_a_broken_encoder_blames_no_text() -> None:
    def fault(texts: Sequence[str]) -> None:
        raise RuntimeError("device-side assert")

    with pytest.raises(EncoderBroken, match="RuntimeError"):
        run(FakeEncoder(fault=fault), ["one", "two"])


def test_no_memory_even_for_a_word_blames_no_text() -> None:
    def fault(texts: Sequence[str]) -> None:
        raise MemoryError

    with pytest.raises(OutOfMemory):
        run(FakeEncoder(fault=fault), ["one", "two"])


class Cancelled(Exception):
    """An ordinary exception, as a query's cancel is."""


@pytest.mark.parametrize("calls", range(6))
def test_what_the_checkpoint_raises_passes_untouched(calls: int) -> None:
    left = calls

    def checkpoint() -> None:
        nonlocal left
        if left == 0:
            raise Cancelled
        left -= 1

    encoder = FakeEncoder(fault=refuse("text 1"))
    with pytest.raises(Cancelled):
        encode_all(encoder, [f"text {number}" for number in range(40)], prompt="", checkpoint=checkpoint)
    assert len(encoder.batches) <= calls


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_the_process_passes(stop: type[BaseException]) -> None:
    with pytest.raises(stop):
        run(FakeEncoder(fault=refuse("one", error=stop)), ["one", "two"])


def test_a_slow_model_gets_smaller_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 padded tokens a second: 0.4 s are 20 of them."""
    clock = 0.0

    def work(texts: Sequence[str]) -> None:
        nonlocal clock
        clock += len(texts) * len(texts[0]) / 50

    monkeypatch.setattr(time, "monotonic", lambda: clock)
    encoder = FakeEncoder(fault=work, weights=1 << 50)
    run(encoder, [f"{number:025}" for number in range(20)])
    assert [len(batch) for batch in encoder.batches] == [8, 2, 2, 2, 2, 2, 2]


def test_micro_batches_do_not_shrink_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that costs a second however small it is, as on a busy machine, is not cut into more of them."""
    clock = 0.0

    def work(_texts: Sequence[str]) -> None:
        nonlocal clock
        clock += 1

    monkeypatch.setattr(time, "monotonic", lambda: clock)
    encoder = FakeEncoder(fault=work)
    run(encoder, [f"{number:025}" for number in range(32)])
    assert [len(batch) for batch in encoder.batches] == [8, 8, 8, 8]


def test_the_first_micro_batch_is_small_until_the_pace_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "FIRST_MICRO_BATCH_TOKENS", 20)
    encoder = FakeEncoder()
    run(encoder, [f"{number:010}" for number in range(10)])
    assert [len(batch) for batch in encoder.batches] == [2, 8]


def test_every_vector_passes_the_gate() -> None:
    bent = {
        "nan": np.full(4, np.nan, np.float32),
        "zero": np.zeros(4, np.float32),
        "short": np.ones(3, np.float32),
        "long": np.ones(4, np.float32),
    }
    outcomes = run(FakeEncoder(bend=bent.get), [*bent, "good"])
    assert [outcome.kind if isinstance(outcome, Failure) else "" for outcome in outcomes] == ["vector"] * 4 + [""]
