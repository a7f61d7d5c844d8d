"""A session on the terminal: statements as one would type them, answers below, the seconds each took."""

import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

WIDTH = 100
INDENT = "   "


class Screen:
    def __init__(self) -> None:
        self.colours = sys.stdout.isatty()

    def title(self, text: str) -> None:
        self.line(f"\n{self.styled(text, '1')}")

    def line(self, text: str = "") -> None:
        print(text, flush=True)

    def statement(self, text: str) -> None:
        first, *rest = text.strip().splitlines()
        self.line(f"{self.styled('=>', '2')} {self.styled(first, '36')}")
        for line in rest:
            self.line(f"{INDENT}{self.styled(line, '36')}")

    def answer(self, text: str, seconds: float | None = None) -> None:
        took = f"  {self.styled(f'[{seconds:.2f} s]', '2')}" if seconds is not None else ""
        self.line(f"{INDENT}{text}{took}")

    def notice(self, text: str) -> None:
        self.line(f"{INDENT}{self.styled(text, '33')}")

    def hit(self, distance: float, heading: str, text: str, lines: int) -> None:
        self.line(f"{INDENT}{distance:.3f}  {self.styled(heading, '1')}")
        for line in textwrap.wrap(" ".join(text.split()), WIDTH - 10, max_lines=lines, placeholder=" …"):
            self.line(f"{INDENT}       {line}")

    def table(self, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Numbers to the right, as psql has them."""
        cells = [list(names), *[[shown(value) for value in row] for row in rows]]
        widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
        marks = [">" if isinstance(value, int | float) else "<" for value in rows[0]]
        for number, row in enumerate(cells):
            padded = [f"{cell:{mark}{width}}" for cell, mark, width in zip(row, marks, widths, strict=True)]
            self.line(INDENT + " | ".join(padded).rstrip())
            if number == 0:
                self.line(INDENT + "-+-".join("-" * width for width in widths))

    def styled(self, text: str, style: str) -> str:
        return f"\033[{style}m{text}\033[0m" if self.colours else text


def shown(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "t" if value else "f"
        case float():
            return f"{value:.1f}"
        case list():
            return ", ".join(map(str, value))
    return str(value)


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """The seconds that the block took, once it is over."""
    seconds: list[float] = []
    started = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - started)
