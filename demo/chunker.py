"""The manual's sections, cut into chunks of a size that an embedding model reads whole.

python -m demo.chunker FOLDER [PART …] prints how many there are and how long they are.
"""

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from demo.manual import USER_PARTS, Block, Section, sections

SEPARATOR = " \u203a "  # a small >
TARGET, LIMIT, SMALL = 195, 225, 60  # tokens of header and text, as estimated by `weight`
SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+(?=[A-Z(“])")
WORD_OR_MARK = re.compile(r"[^\W_]+|[^\w\s]|_")


@dataclass(frozen=True)
class Chunk:
    chunk_hash: str
    chunk_text: str
    context_header: str
    source_file: str
    chunk_index: int = 0
    total_chunks: int = 0


@dataclass(frozen=True)
class Topic:
    """A section as a question: its title, and the chunks of which one should be found."""

    title: str
    context_header: str
    chunk_hashes: frozenset[str]


def chunks(folder: Path, parts: frozenset[str] | None = USER_PARTS) -> list[Chunk]:
    """The chunks of the manual in this folder: reading order, each text once, numbered within their page."""
    return numbered(unique(chunk for section in sections(folder, parts) for chunk in cut(section)))


def topics(corpus: Iterable[Chunk]) -> list[Topic]:
    """Each section that has chunks, in order. A title that several sections share is preceded by the title above it."""
    hashes: dict[str, set[str]] = {}
    for chunk in corpus:
        hashes.setdefault(chunk.context_header, set()).add(chunk.chunk_hash)
    paths = {header: [unnumbered(title) for title in header.split(SEPARATOR)] for header in hashes}
    shared = Counter(path[-1] for path in paths.values())
    return [
        Topic(path[-1] if shared[path[-1]] == 1 else ": ".join(path[-2:]), header, frozenset(hashes[header]))
        for header, path in paths.items()
    ]


def unnumbered(title: str) -> str:
    return re.sub(r"^(?:(?:Part|Chapter|Appendix) [IVXA-Z\d]+\.|[A-Z\d]+(?:\.\d+)+\.) ", "", title)


def cut(section: Section) -> Iterator[Chunk]:
    header = SEPARATOR.join(section.path)
    room = weight(header)
    for group in packed([piece for block in section.blocks for piece in pieces(block, LIMIT - room)], room):
        text = render(group)
        yield Chunk(hashlib.sha256(text.encode()).hexdigest(), text, header, section.source_file)


def packed(blocks: Iterable[Block], room: int) -> list[list[Block]]:
    """Blocks in groups of about the target; what is left over joins the group before it where that can take it."""
    groups: list[list[Block]] = []
    for block in blocks:
        if groups and room + weight(render([*groups[-1], block])) <= TARGET:
            groups[-1].append(block)
        else:
            groups.append([*introduction(groups, block, room), block])
    if len(groups) > 1 and room + weight(render(groups[-1])) < SMALL:
        together = groups[-2] + groups[-1]
        if room + weight(render(together)) <= LIMIT:
            groups[-2:] = [together]
    return groups


def introduction(groups: list[list[Block]], block: Block, room: int) -> list[Block]:
    """Takes "…, for example:" out of the group before and along with what it announces, if both fit."""
    if not groups or len(groups[-1]) == 1 or not groups[-1][-1].text.endswith(":"):
        return []
    return [groups[-1].pop()] if room + weight(render([groups[-1][-1], block])) <= LIMIT else []


def pieces(block: Block, limit: int) -> Iterator[Block]:
    """A block that is too long, cut between lines, rows or sentences, or at worst between words."""
    if weight(render([block])) <= limit:
        yield block
        return
    joint = "\n" if block.listing else " "
    parts = block.text.splitlines() if block.listing else SENTENCE_END.split(block.text)
    if len(parts) == 1:
        joint, parts = " ", block.text.split()
    for text in filled(parts, joint, limit - weight(block.lead) - 1):
        piece = replace(block, text=text)
        yield from pieces(piece, limit) if len(parts) > 1 and " " in text else [piece]


def filled(parts: Iterable[str], joint: str, limit: int) -> Iterator[str]:
    text = ""
    for part in parts:
        longer = f"{text}{joint}{part}" if text else part
        if text and weight(longer) > limit:
            yield text
            longer = part
        text = longer
    if text:
        yield text


def render(blocks: Iterable[Block]) -> str:
    """A lead is said once, before the first block that stands under it."""
    lines, lead = [], ""
    for block in blocks:
        if block.lead and block.lead != lead:
            lines.append(f"{block.lead}:\n{block.text}" if block.listing else f"{block.lead}: {block.text}")
        else:
            lines.append(block.text)
        lead = block.lead
    return "\n".join(lines)


def unique(found: Iterable[Chunk]) -> list[Chunk]:
    first: dict[str, Chunk] = {}
    for chunk in found:
        first.setdefault(chunk.chunk_hash, chunk)
    return list(first.values())


def numbered(found: list[Chunk]) -> list[Chunk]:
    total, index = Counter(chunk.source_file for chunk in found), Counter[str]()
    result = []
    for chunk in found:
        result.append(replace(chunk, chunk_index=index[chunk.source_file], total_chunks=total[chunk.source_file]))
        index[chunk.source_file] += 1
    return result


def weight(text: str) -> int:
    """About how many tokens a WordPiece tokenizer makes of it, without having one at hand."""
    return sum(word_weight(word) for word in WORD_OR_MARK.findall(text))


@cache
def word_weight(word: str) -> int:
    return 1 if len(word) <= 8 else 2 if len(word) <= 13 else 3


def main() -> None:
    parts = frozenset(sys.argv[2:]) or USER_PARTS
    corpus = chunks(Path(sys.argv[1]), None if parts == {"all"} else parts)
    weights = sorted(weight(chunk.context_header + " " + chunk.chunk_text) for chunk in corpus)
    print(
        f"{len(corpus)} chunks of {len({chunk.source_file for chunk in corpus})} pages, {len(topics(corpus))} sections"
    )
    print(f"about {sum(weights) // len(weights)} tokens each, from {weights[0]} to {weights[-1]}")


if __name__ == "__main__":
    main()
