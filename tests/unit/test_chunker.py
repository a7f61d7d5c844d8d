"""The chunker, on pieces of the PostgreSQL manual's own HTML."""

import re
from pathlib import Path

import pytest
from demo import chunker, manual
from demo.chunker import LIMIT, SEPARATOR, Chunk, weight
from demo.manual import Block, Section

HEAD = """<?xml version="1.0" encoding="UTF-8" standalone="no"?>
<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN" "xhtml1-transitional.dtd">
<html xmlns="http://www.w3.org/1999/xhtml"><head><title>{title}</title><link rel="next" href="{next}" title="x" />
</head>
<body id="docContent"><div class="navheader"><table><tr><td><a accesskey="p" href="index.html">Prev</a> </td>
<td><a accesskey="u" href="{up}" title="Up">Up</a></td></tr></table><hr /></div>"""
FOOT = """<div class="navfooter"><hr /><table><tr><td>Prev</td><td>Home</td></tr></table></div></body></html>"""

DUMP = """<div class="sect1" id="BACKUP-DUMP"><div class="titlepage"><div><div><h2 class="title" style="clear: both">
26.1. <acronym class="acronym">SQL</acronym> Dump</h2></div></div></div><div class="toc"><dl class="toc"><dt>
<span class="sect2"><a href="backup-dump.html#BACKUP-DUMP-RESTORE">26.1.1. Restoring</a></span></dt></dl></div><p>
   The idea behind this dump method is to generate a file with SQL
   commands that, when fed back to the server, will recreate the
   database in the same state as it was at the time of the dump.
   <span class="productname">PostgreSQL</span> provides the utility program
   <a class="xref" href="app-pgdump.html" title="pg_dump"><span class="refentrytitle">pg_dump</span></a>
   for this purpose. The basic usage of this command is:
</p><pre class="synopsis">
pg_dump <em class="replaceable"><code>dbname</code></em> &gt; <em class="replaceable"><code>dumpfile</code></em>
</pre><div class="sect2" id="BACKUP-DUMP-RESTORE"><div class="titlepage"><div><div><h3 class="title">26.1.1.
Restoring the Dump <a href="#BACKUP-DUMP-RESTORE" class="id_link">#</a></h3></div></div></div><p>
    Text files created by <span class="application">pg_dump</span> are intended to
    be read in by the <span class="application">psql</span> program.
   </p></div></div>"""

SETTINGS = """<div class="sect1"><div class="titlepage"><div><h2 class="title">20.11. Defaults</h2></div></div>
<div class="variablelist"><dl class="variablelist"><dt id="GUC-CLIENT-MIN-MESSAGES"><span class="term">
<code class="varname">client_min_messages</code> (<code class="type">enum</code>)
 <a id="id-1.6" class="indexterm"></a></span></dt><dd><p>
        Controls which message levels are sent to the client.
       </p><p><code class="literal">INFO</code> level messages are always sent to the client.
       </p></dd><dt><span class="term">
<code class="varname">search_path</code> (<code class="type">string</code>)</span>
</dt><dd><p>
        This variable specifies the order in which schemas are searched.</p></dd></dl></div></div>"""

FUNCTIONS = """<div class="sect1"><div class="titlepage"><div><div><h2 class="title">9.4. Strings</h2></div></div></div>
<div class="table"><p class="title"><strong>Table 9.9. <acronym>SQL</acronym> String Functions</strong></p>
<div class="table-contents"><table class="table" border="1"><colgroup><col /></colgroup>
<thead><tr><th class="func_table_entry"><p class="func_signature">Function</p> <p>Description</p></th></tr></thead>
<tbody><tr><td class="func_table_entry"><p class="func_signature">
        <a id="id-1.5.8" class="indexterm"></a>
        <code class="type">text</code> <code class="literal">||</code> <code class="type">text</code>
        → <code class="returnvalue">text</code>
       </p>
       <p> Concatenates the two strings. </p></td></tr><tr><td class="func_table_entry"><p class="func_signature">
        <code class="function">lower</code> ( <code class="type">text</code> )
        → <code class="returnvalue">text</code>
       </p>
       <p> Converts the string to all lower case. </p></td></tr></tbody></table></div></div>
<br class="table-break" /></div>"""

VACUUM = """<div class="refentry" id="SQL-VACUUM"><div class="titlepage"></div><a id="id-1.9" class="indexterm"></a>
<div class="refnamediv"><h2><span class="refentrytitle">VACUUM</span></h2><p>
VACUUM — garbage-collect a database</p></div>
<div class="refsynopsisdiv"><h2>Synopsis</h2><pre class="synopsis">
VACUUM [ FULL ] [ FREEZE ]

<span class="phrase">where <em class="replaceable"><code>option</code></em> can be one of:</span>

    FULL [ <em class="replaceable"><code>boolean</code></em> ]
</pre></div><div class="refsect1"><h2>Description</h2><p>
   <code class="command">VACUUM</code> reclaims storage occupied by dead tuples.
  </p></div><div class="refsect1"><h2>See Also</h2><span class="simplelist">
<a class="xref" href="app-vacuumdb.html">vacuumdb</a></span></div></div>"""


def titled(css_class: str, title: str, text: str = "") -> str:
    return f'<div class="{css_class}"><div class="titlepage"><h2 class="title">{title}</h2></div>{text}</div>'


PAGES = {  # in reading order, each with the page above it
    "index.html": (
        "index.html",
        "PostgreSQL 15 Documentation",
        titled("book", "PostgreSQL 15 Documentation", "<p>Contents</p>"),
    ),
    "legalnotice.html": (
        "index.html",
        "Legal Notice",
        titled("legalnotice", "Legal Notice", "<p>All rights kept.</p>"),
    ),
    "admin.html": ("index.html", "Part III. Server Administration", titled("part", "Part III. Server Administration")),
    "backup.html": (
        "admin.html",
        "Chapter 26. Backup",
        titled("chapter", "Chapter 26. Backup", "<p>Back up your data regularly.</p>"),
    ),
    "backup-dump.html": ("backup.html", "26.1. SQL Dump", DUMP),
    "reference.html": ("index.html", "Part VI. Reference", titled("part", "Part VI. Reference")),
    "sql-select.html": ("reference.html", "SELECT", VACUUM.replace("VACUUM", "SELECT")),
    "bookindex.html": ("index.html", "Index", titled("index", "Index", "<p>abs, 9.3</p>")),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small manual, a level below the folder that is given, as the package unpacks."""
    html = tmp_path / "usr" / "html"
    html.mkdir(parents=True)
    following = [*list(PAGES)[1:], ""]
    for (name, (up, title, body)), after in zip(PAGES.items(), following, strict=True):
        (html / name).write_text(HEAD.format(title=title, next=after, up=up) + body + FOOT, "utf8")
    return tmp_path


def read(html: str) -> list[Section]:
    body = manual.parse("page.html", (HEAD.format(title="t", next="", up="") + html + FOOT).encode()).body
    assert body is not None
    return list(manual.cut(body, (), "page.html"))


def words(count: int, end: str = ".") -> str:
    return " ".join(["stone"] * count) + end


def texts(*blocks: Block, path: tuple[str, ...] = ("Part I. Tutorial",)) -> list[str]:
    return [chunk.chunk_text for chunk in chunker.cut(Section(path, "page.html", blocks))]


def test_sections_stand_below_their_part_and_chapter(folder: Path) -> None:
    paths = [chunk.context_header.split(SEPARATOR) for chunk in chunker.chunks(folder)]
    above = ["Part III. Server Administration", "Chapter 26. Backup"]
    assert paths == [above, [*above, "26.1. SQL Dump"], [*above, "26.1. SQL Dump", "26.1.1. Restoring the Dump"]]


def test_the_whole_manual_leaves_out_title_page_law_and_index(folder: Path) -> None:
    files = [chunk.source_file for chunk in chunker.chunks(folder, parts=None)]
    assert list(dict.fromkeys(files)) == ["backup.html", "backup-dump.html", "sql-select.html"]


def test_chunks_are_numbered_within_their_page(folder: Path) -> None:
    numbers = [(c.source_file, c.chunk_index, c.total_chunks) for c in chunker.chunks(folder)]
    assert numbers == [("backup.html", 0, 1), ("backup-dump.html", 0, 2), ("backup-dump.html", 1, 2)]


def test_the_same_folder_gives_the_same_chunks(folder: Path) -> None:
    assert chunker.chunks(folder) == chunker.chunks(folder)


def test_no_manual(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<html></html>")
    with pytest.raises(manual.NoManual):
        chunker.chunks(tmp_path)


def test_paragraphs_listings_and_inline_markup() -> None:
    section, inner = read(DUMP)
    assert section.path == ("26.1. SQL Dump",)
    assert inner.path == ("26.1. SQL Dump", "26.1.1. Restoring the Dump")
    assert section.blocks[0].text.endswith(
        "PostgreSQL provides the utility program pg_dump for this purpose. The basic usage of this command is:"
    )
    assert section.blocks[1] == Block("pg_dump dbname > dumpfile", listing=True)
    assert "Prev" not in " ".join(block.text for block in section.blocks)


def test_a_setting_keeps_its_name() -> None:
    (section,) = read(SETTINGS)
    assert [block.lead for block in section.blocks] == ["client_min_messages (enum)"] * 2 + ["search_path (string)"]
    assert chunker.render(section.blocks[:2]) == (
        "client_min_messages (enum): Controls which message levels are sent to the client.\n"
        "INFO level messages are always sent to the client."
    )


def test_a_table_is_its_rows_under_its_title() -> None:
    (section,) = read(FUNCTIONS)
    lead = "Table 9.9. SQL String Functions"
    assert section.blocks == (
        Block("text || text → text Concatenates the two strings.", lead),
        Block("lower ( text ) → text Converts the string to all lower case.", lead),
    )


def test_a_table_without_title_stands_under_its_heads() -> None:
    heads, row = "<tr><th>Name</th><th>Size</th></tr>", "<tr><td>bigint</td><td>8 bytes</td></tr>"
    table = f"<table><thead>{heads}</thead><tbody>{row}</tbody></table>"
    (section,) = read(titled("sect1", "8.1. Numeric Types", table))
    assert section.blocks == (Block("bigint | 8 bytes", "Name | Size"),)


def test_a_reference_page() -> None:
    sections = read(VACUUM)
    assert [section.path for section in sections] == [("VACUUM",), ("VACUUM", "Synopsis"), ("VACUUM", "Description")]
    assert sections[0].blocks == (Block("VACUUM — garbage-collect a database"),)
    assert sections[1].blocks[0].text == "VACUUM [ FULL ] [ FREEZE ]\nwhere option can be one of:\n    FULL [ boolean ]"


def test_wide_rules_are_shortened_and_soft_breaks_dropped() -> None:
    (section,) = read(titled("sect1", "x", "<pre>\n ?column?\n----------\n        4\nlong\u200bname</pre>"))
    assert section.blocks[0].text == " ?column?\n---\n        4\nlongname"


def test_short_paragraphs_share_a_chunk_up_to_the_target() -> None:
    (first, second) = texts(*[Block(words(40))] * 6)
    assert first.count("\n") == 3
    assert second.count("\n") == 1


def test_a_small_rest_joins_the_chunk_before() -> None:
    assert len(texts(Block(words(180)), Block(words(20)))) == 1


def test_an_announcement_stays_with_its_listing() -> None:
    listing = "select 1;\nselect 2;\n" * 20
    _, second = texts(Block(words(90)), Block("For example:"), Block(listing, listing=True))
    assert second.startswith("For example:\nselect 1;")


@pytest.mark.parametrize(
    "block",
    [
        Block(" ".join(words(30).capitalize() for _ in range(20)), lead="A term"),
        Block("\n".join(f"insert into t values ({n});" for n in range(100)), listing=True),
        Block(words(900)),
        Block("x" * 5000),
    ],
    ids=["sentences", "lines", "one long sentence", "one word"],
)
def test_a_long_block_is_cut_and_nothing_is_lost(block: Block) -> None:
    found = texts(block)
    assert all(weight(text) <= LIMIT for text in found)
    together = " ".join(text.removeprefix("A term: ") for text in found)
    assert together.split() == block.text.split()


def test_each_piece_of_a_long_entry_says_what_it_belongs_to() -> None:
    assert all(
        text.startswith("work_mem: ") for text in texts(Block(". ".join([words(60, "").capitalize()] * 8), "work_mem"))
    )


def test_the_same_text_is_kept_once() -> None:
    text = "This section is about something else."
    chunk = [
        *chunker.cut(Section(("A",), "a.html", (Block(text),))),
        *chunker.cut(Section(("B",), "b.html", (Block(text),))),
    ]
    assert [kept.source_file for kept in chunker.unique(chunk)] == ["a.html"]
    assert re.fullmatch("[0-9a-f]{64}", chunk[0].chunk_hash)


def test_topics_are_titles_without_numbers() -> None:
    def chunk(name: str, *path: str) -> Chunk:
        return Chunk(name, name, SEPARATOR.join(path), "page.html")

    corpus = [
        chunk("1", "Part III. Server", "26.1. SQL Dump"),
        chunk("2", "Part III. Server", "26.1. SQL Dump"),
        chunk("3", "Part III. Server", "26.1. SQL Dump", "26.1.1. Notes"),
        chunk("4", "Chapter 9. Functions", "9.2. Notes"),
    ]
    assert [(topic.title, sorted(topic.chunk_hashes)) for topic in chunker.topics(corpus)] == [
        ("SQL Dump", ["1", "2"]),
        ("SQL Dump: Notes", ["3"]),
        ("Functions: Notes", ["4"]),
    ]
