"""Reads the documents: their fenced blocks, their links, and the psql script that a page is for a reader who types it.

A comment on the line before a fence says what to expect of its block:
`<!-- not run: reason -->`, `<!-- raises SQLSTATE -->` (its last statement does), or, before a block of text,
`<!-- output -->` (the sql block before it ends with this output).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^( *)```(\w*) *$")
COMMENT = re.compile(r"^ *<!-- (.*) -->$")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`]+)`")
STATEMENT = re.compile(r"(select|call|update) [^\u2026]*")
MARK = "block at line"


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is the number of its first line, and `said` the comment before its fence."""

    language: str
    line: int
    lines: list[str]
    said: str

    @property
    def not_run(self) -> str | None:
        """The reason why it is not run, where it is not."""
        return self.said.removeprefix("not run:").strip() if self.said.startswith("not run:") else None

    @property
    def raises(self) -> str | None:
        """The SQLSTATE that its last statement must end with."""
        return self.said.removeprefix("raises ") if self.said.startswith("raises ") else None

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@dataclass(frozen=True)
class Page:
    """A document; its name is its path below the repository's root."""

    name: str
    blocks: list[Block] = field(default_factory=list)
    prose: list[tuple[int, str]] = field(default_factory=list)

    @cached_property
    def path(self) -> Path:
        return ROOT / self.name

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def of(self, *languages: str) -> list[Block]:
        return [block for block in self.blocks if block.language in languages]

    def links(self) -> Iterator[tuple[int, str]]:
        for number, line in self.prose:
            yield from ((number, target) for target in LINK.findall(line))

    def code(self) -> Iterator[tuple[int, str]]:
        """The pieces of code within its prose."""
        for number, line in self.prose:
            yield from ((number, piece) for piece in CODE.findall(line))

    def anchors(self) -> set[str]:
        return {slug(line.lstrip("#")) for _, line in self.prose if line.startswith("#")}


def slug(heading: str) -> str:
    """What a heading's anchor is called, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def read_page(name: str) -> Page:
    """A page's blocks and its prose, each line with its number from 1."""
    page = Page(name)
    indent, said = None, ""
    for number, line in enumerate(page.text.splitlines(), 1):
        fence = FENCE.match(line)
        if indent is None and fence:
            indent = fence[1]
            page.blocks.append(Block(fence[2], number + 1, [], said))
        elif indent is not None and fence and not fence[2]:
            indent, said = None, ""
        elif indent is not None:
            page.blocks[-1].lines.append(line.removeprefix(indent))
        else:
            comment = COMMENT.match(line)
            said = comment[1] if comment else ""
            page.prose.append((number, line))
    return page


def script(page: Page) -> str:
    """The page as psql reads it: each statement stands on the line that it has in the page."""
    lines = [""] * (len(page.text.splitlines()) + 1)
    for block in page.of("sql"):
        if block.not_run is not None:
            continue
        first, end = block.line - 1, block.line - 1 + len(block.lines)
        lines[first:end] = block.lines
        lines[first - 1] = rf"\echo {MARK} {block.line}"
        if block.raises:
            lines[first - 1] += r" \set ON_ERROR_STOP off"
            lines[end] = r"\echo :SQLSTATE \set ON_ERROR_STOP on"
    return "\n".join(lines)


def statements(page: Page) -> Iterator[tuple[int, str]]:
    """The statements that stand whole within the page's prose."""
    return ((number, piece) for number, piece in page.code() if STATEMENT.fullmatch(piece))


def outputs(said: str) -> dict[int, str]:
    """What psql printed for each block, by the block's line; no spaces at the lines' ends."""
    said = re.sub(r" +$", "", said, flags=re.MULTILINE)
    parts = re.split(rf"^{MARK} (\d+)$", said, flags=re.MULTILINE)
    return {int(number): text.strip("\n") for number, text in zip(parts[1::2], parts[2::2], strict=True)}


def commands(block: Block) -> Iterator[tuple[int, list[str]]]:
    """The commands of a shell's block: their words, without sudo and assignments before them."""
    for number, line in enumerate(block.lines, block.line):
        reader = shlex.shlex(line, posix=True, punctuation_chars=True)
        reader.whitespace_split = True
        words: list[str] = []
        for word in [*reader, ";"]:
            if set(word) <= set("&|;"):
                if words:
                    yield number, words
                words = []
            elif words or not (word == "sudo" or re.match(r"\w+=", word)):
                words.append(word)
