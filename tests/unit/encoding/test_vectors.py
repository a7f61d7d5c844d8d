from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pgvector import Vector

from autoembed.encoding import vectors
from unit.fakes import MODEL


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_text_reads_back_as_the_same_float32(numbers: list[float]) -> None:
    vector = np.array(numbers, dtype=np.float32)
    text = vectors.to_text(vector)
    assert text.startswith("[")
    assert text.endswith("]")
    assert np.array_equal(np.array(text[1:-1].split(","), dtype=np.float32), vector)


def test_the_text_is_pgvectors_form() -> None:
    assert vectors.to_text(np.array([1, 0.5, -2], dtype=np.float32)) == "[1.0,0.5,-2.0]"
    assert Vector.from_text(vectors.to_text(np.arange(3, dtype=np.float32))).to_list() == [0, 1, 2]


def test_a_row_of_a_transposed_matrix_is_no_trap() -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert vectors.to_text(matrix[:, 1]) == "[3.0,4.0,5.0]"


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([1, 0, 0], "expected were 4 dimensions"),
        ([1, 0, 0, float("nan")], "not finite"),
        ([1, 0, 0, float("inf")], "not finite"),
        ([0, 0, 0, 0], "zero"),
        ([1, 1, 0, 0], "norm is 1.414"),
        ([0.99, 0, 0, 0], "norm is 0.99"),
    ],
)
def test_the_gate_says_why(numbers: list[float], words: str) -> None:
    problem = vectors.problem(np.array(numbers, dtype=np.float32), MODEL)
    assert problem is not None
    assert words in problem


def test_the_gate_lets_good_vectors_through() -> None:
    assert vectors.problem(np.array([0.5, 0.5, 0.5, 0.5], dtype=np.float32), MODEL) is None
    loose = replace(MODEL, normalizes=False)
    assert vectors.problem(np.array([3e19, 4e19, 0, 0], dtype=np.float32), loose) is None
