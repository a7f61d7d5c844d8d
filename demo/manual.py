"""The PostgreSQL manual's HTML: its pages in reading order, its sections, and the blocks of text in them."""

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

from bs4 import BeautifulSoup, Tag, XMLParsedAsHTMLWarning

USER_PARTS = frozenset({"I", "II", "III"})  # Tutorial, The SQL Language, Server Administration
SECTIONS = frozenset(
    {"part", "reference", "chapter", "appendix", "preface", "refentry", "refsynopsisdiv", "simplesect"}
)
LEFT_OUT_PAGES = frozenset({"book", "index", "legalnotice", "bibliography"})
LEFT_OUT_TITLES = frozenset({"See Also"})
NOISE = "div.toc, div.titlepage, a.indexterm, a.id_link, div.figure, sup, hr, br"
SOFT_BREAK = "\u200b"  # where a browser may break a word
BLOCKS = ("p", "pre", "dl", "ul", "ol", "table", "div", "blockquote")
HEADINGS = ("h1", "h2", "h3", "h4", "h5")


class NoManual(Exception):
    """The folder holds no PostgreSQL manual (no index.html of its HTML edition)."""


@dataclass(frozen=True)
class Block:
    """A paragraph, a list item, a table row or a listing. The lead is what it stands under: a term, a table's title."""

    text: str
    lead: str = ""
    listing: bool = False


@dataclass(frozen=True)
class Section:
    """A section's own text, without that of the sections inside it."""

    path: tuple[str, ...]
    source_file: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    name: str
    title: str
    up: str | None
    next: str | None
    body: Tag | None


def html_folder(folder: Path) -> Path:
    """The folder of the manual's index.html, anywhere below the one given."""
    found = [
        index.parent for index in sorted(folder.rglob("index.html")) if (index.parent / "sql-select.html").exists()
    ]
    if not found:
        raise NoManual(f"no PostgreSQL manual below {folder}")
    return found[0]


def sections(folder: Path, parts: frozenset[str] | None = USER_PARTS) -> Iterator[Section]:
    """The sections of these parts (roman numerals; None: the whole manual) in reading order."""
    titles: dict[str, tuple[str, ...]] = {}
    read: set[str] = set()
    for page in pages(html_folder(folder)):
        above = titles.get(page.up or "", ())
        titles[page.name] = path = (*above, page.title) if page.name != "index.html" else ()
        if page.body is not None and (parts is None or part_of(path) in parts):
            yield from cut(page.body, above, page.name)
        read.add(part_of(path))
        if parts is not None and parts <= read - {part_of(path)}:
            return


def part_of(path: tuple[str, ...]) -> str:
    numeral = re.match(r"Part ([IVX]+)\.", path[0]) if path else None
    return numeral[1] if numeral else ""


def pages(html: Path) -> Iterator[Page]:
    """From the title page on, each page names the next."""
    name: str | None = "index.html"
    seen: set[str] = set()
    while name and name not in seen and (html / name).exists():
        seen.add(name)
        page = parse(name, (html / name).read_bytes())
        yield page
        name = page.next


def parse(name: str, markup: bytes) -> Page:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)  # the pages are XHTML; an HTML parser reads them well
        soup = BeautifulSoup(markup, "lxml")
    up, following = href(soup, "div.navheader a[accesskey=u]"), href(soup, "link[rel=next]")
    for noise in soup.select("div.navheader, div.navfooter"):
        noise.decompose()
    body = soup.body.find("div", recursive=False) if soup.body else None
    return Page(
        name=name,
        title=prose(soup.title) if soup.title else name,
        up=up,
        next=following,
        body=body if isinstance(body, Tag) and not LEFT_OUT_PAGES & classes(body) else None,
    )


def href(soup: BeautifulSoup, selector: str) -> str | None:
    link = soup.select_one(selector)
    return str(link["href"]).partition("#")[0] if link else None


def cut(element: Tag, above: tuple[str, ...], source_file: str) -> Iterator[Section]:
    """This section and those inside it."""
    path = (*above, title_of(element))
    if path[-1] in LEFT_OUT_TITLES:
        return
    inner = [child for child in element.find_all("div") if is_section(child) and enclosing(child) is element]
    for child in inner:
        child.extract()
    for noise in element.select(NOISE):
        noise.extract()
    if own := tuple(blocks(element)):
        yield Section(path, source_file, own)
    for child in inner:
        yield from cut(child, path, source_file)


def is_section(element: Tag) -> bool:
    return any(name in SECTIONS or re.fullmatch(r"(ref)?sect\d", name) for name in classes(element))


def enclosing(element: Tag) -> Tag | None:
    return next((parent for parent in element.parents if is_section(parent)), None)


def title_of(section: Tag) -> str:
    """Sections have a title page, a reference page's sections a heading, the reference page itself its name."""
    for selector in (":scope > div.titlepage .title", ":scope > h2, :scope > h3", ":scope .refentrytitle"):
        if title := section.select_one(selector):
            for link in title.select("a.id_link, a.indexterm"):
                link.extract()
            return prose(title)
    return ""


def blocks(element: Tag, lead: str = "") -> Iterator[Block]:
    """The blocks in an element, in order."""
    if not element.find(BLOCKS, recursive=False):
        yield from paragraph(element, lead)
        return
    for child in element.find_all(True, recursive=False):
        yield from block(child, lead)


def block(element: Tag, lead: str) -> Iterator[Block]:
    match element.name:
        case name if name in HEADINGS:
            return
        case "pre":
            yield from listing(element, lead)
        case "dl":
            yield from definitions(element, lead)
        case "table":
            yield from rows(element, lead)
        case "p":
            yield from paragraph(element, lead)
        case _ if caption := element.select_one(":scope > p.title"):
            caption.extract()
            yield from blocks(element, under(lead, prose(caption)))
        case _:
            yield from blocks(element, lead)


def paragraph(element: Tag, lead: str) -> Iterator[Block]:
    if text := prose(element):
        yield Block(text, lead)


def listing(element: Tag, lead: str) -> Iterator[Block]:
    """As it stands, but for empty lines, and for rules as wide as the page."""
    lines = dedent(element.get_text().replace(SOFT_BREAK, "").strip("\n")).splitlines()
    if text := "\n".join(re.sub(r"([-=])\1{3,}", r"\1\1\1", line.rstrip()) for line in lines if line.strip()):
        yield Block(text, lead, listing=True)


def definitions(element: Tag, lead: str) -> Iterator[Block]:
    terms: list[str] = []
    for child in element.find_all(["dt", "dd"], recursive=False):
        if child.name == "dt":
            terms.append(prose(child))
            continue
        yield from blocks(child, under(lead, ", ".join(terms)))
        terms.clear()


def rows(element: Tag, lead: str) -> Iterator[Block]:
    """One block a row; a table without a title stands under its column heads."""
    heads = " | ".join(prose(cell) for cell in element.select(":scope > thead > tr > th"))
    for row in element.select(":scope > tbody > tr, :scope > tr"):
        if text := " | ".join(filter(None, (prose(cell) for cell in row.find_all(["td", "th"], recursive=False)))):
            yield Block(text, lead or heads)


def under(lead: str, title: str) -> str:
    return f"{lead}, {title}" if lead and title else lead or title


def prose(element: Tag) -> str:
    """An element's text in one line."""
    return " ".join(element.get_text().replace(SOFT_BREAK, "").split())


def classes(element: Tag) -> frozenset[str]:
    return frozenset(element.get_attribute_list("class")) - {None} if element.has_attr("class") else frozenset()
