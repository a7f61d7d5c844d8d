import string
from collections.abc import Iterator

import pytest

from autoembed import errors
from autoembed.errors import AutoembedError


def leaves(kind: type[AutoembedError]) -> Iterator[type[AutoembedError]]:
    for each in kind.__subclasses__():
        yield each
        yield from leaves(each)


@pytest.mark.parametrize("kind", list(dict.fromkeys(leaves(AutoembedError))))
def test_each_error_has_a_sqlstate_and_renders_its_docstring(kind: type[AutoembedError]) -> None:
    assert len(kind.sqlstate) == 5
    template = f"{kind.__doc__} {kind.default_hint or ''}"
    fields = {field: f"<{field}>" for _, field, _, _ in string.Formatter().parse(template) if field}
    error = kind(**fields)
    assert all(value in f"{error} {error.hint}" for value in fields.values())
    assert "\n" not in str(error)
    assert error.args == (str(error),)


def test_a_given_hint_wins() -> None:
    assert errors.BrokenModel(name="m", reason="r", hint="do this").hint == "do this"


def test_braces_in_values_are_left_alone() -> None:
    assert str(errors.BrokenModel(name="m", reason="{oops}")) == 'model "m" cannot be used: {oops}'
