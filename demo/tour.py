"""The demo's steps: a table of text, a declaration, a call that fills it, and what one can ask then.

AUTOEMBED_DSN       the database (libpq keywords or URI)
AUTOEMBED_DOC_DIR   the PostgreSQL manual's HTML, or a folder above it
DEMO_MODEL          the model: all-MiniLM-L6-v2 unless named
DEMO_PARTS          the manual's parts: "I II III" unless named, or "all"
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from demo.chunker import Chunk, chunks
from demo.manual import USER_PARTS, NoManual
from demo.screen import Screen, stopwatch

MODEL = "all-MiniLM-L6-v2"
MARK = "made by the demo of pg_autoembed"
QUESTIONS = (
    "Why does my table keep growing although I delete rows?",
    "two transactions waiting for each other forever",
    "How can I restore a database to the state it had yesterday at noon?",
)
NOTES = (
    "The office closes at noon on Fridays.",
    "A spare key is with the neighbours in number 12.",
    "Water the plants on the balcony twice a week.",
)
NOTES_QUESTION = "I lost my key. Who has another one?"
COLUMNS = "chunk_hash, chunk_text, context_header, source_file, chunk_index, total_chunks"
PULL_SECONDS = 3600
VOID = 2278  # the type of what returns nothing


class DemoError(Exception):
    """What stops the demo, in words for its user."""


@dataclass
class Tour:
    connection: psycopg.Connection
    screen: Screen
    model: str
    dimensions: int = 0

    def run(self, statement: str) -> psycopg.Cursor:
        """Shows a statement, runs it, shows how it went; a result's rows are the caller's to show."""
        self.screen.statement(statement)
        with stopwatch() as seconds:
            cursor = self.connection.execute(statement.rstrip().rstrip(";").encode())
        self.screen.answer(outcome(cursor), seconds[0])
        return cursor

    def show(self, statement: str) -> list[tuple[Any, ...]]:
        """Runs a query and shows its rows as a table."""
        cursor = self.run(statement)
        rows = cursor.fetchall()
        if rows:
            self.screen.table([column.name for column in cursor.description or ()], rows)
        return rows

    def value(self, query: str, *arguments: object) -> Any:
        """Looks something up without showing it."""
        row = self.connection.execute(query.encode(), arguments).fetchone()
        return row[0] if row else None

    def quoted(self, text: str) -> str:
        return sql.Literal(text).as_string(self.connection)


def outcome(cursor: psycopg.Cursor) -> str:
    """A command's tag; for a query how many rows it gave."""
    rows = re.fullmatch(r"SELECT (\d+)", cursor.statusmessage or "")
    if not rows:
        return cursor.statusmessage or ""
    if cursor.description and cursor.description[0].type_code == VOID:
        return "done"
    return "1 row" if rows[1] == "1" else f"{rows[1]} rows"


def introduce(tour: Tour) -> None:
    tour.screen.title("The PostgreSQL manual, embedded and searched inside the server")
    tour.run("create extension if not exists pg_autoembed cascade;")
    tour.show("select extname, extversion from pg_extension where extname in ('pg_autoembed', 'vector') order by 1;")


def find_model(tour: Tour) -> None:
    tour.screen.title("A model that the server has on its disk")
    status, tour.dimensions = model_status(tour)
    if not status:
        pull(tour)
        status, tour.dimensions = model_status(tour)
    if status != "ready":
        raise DemoError(f"model {tour.model} is in the server's model directory, but {status or 'not found there'}")
    tour.show(
        "select name, dimensions, max_tokens, architecture, precision from embedding_models\n"
        f"where name = {tour.quoted(tour.model)};"
    )


def model_status(tour: Tour) -> tuple[str, int]:
    """'ready' and its dimensions, else what is wrong; nothing where there is no such model."""
    query = "select concat_ws(': ', status, note), status = 'ready', dimensions from embedding_models where name = %s"
    row = tour.connection.execute(query, [tour.model]).fetchone()
    if not row:
        return "", 0
    return ("ready", row[2]) if row[1] else (row[0], 0)


def pull(tour: Tour) -> None:
    """From the hub; the server itself never downloads."""
    command = ["autoembed", "model", "pull", tour.model]
    tour.screen.answer(f"the server has no model {tour.model}: {' '.join(command)}")
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, timeout=PULL_SECONDS, check=False
        )
        said = [line for line in done.stderr.strip().splitlines() if not line.startswith("hint:")]
        why = "" if done.returncode == 0 else (said or ["it gave no reason"])[-1].removeprefix("error: ")
    except subprocess.TimeoutExpired:
        why = "the hub took more than an hour"
    if why:
        raise DemoError(
            f"model {tour.model} is neither in the server's model directory nor to be had from the hub ({why}).\n"
            f"With its files at hand: autoembed model add PATH --name {tour.model}"
        )


def load(tour: Tour, corpus: Sequence[Chunk]) -> None:
    """Makes the table and copies the chunks, unless a former run has left just that."""
    tour.screen.title("A table of text, with a column for the vectors")
    if same_table(tour, corpus):
        tour.screen.answer(
            "knowledge_base is there from the last run, with the same chunks and model: going on with it"
        )
        return
    drop(tour, "knowledge_base")
    create(tour, "knowledge_base")
    statement = f"copy knowledge_base ({COLUMNS})\nfrom stdin;"
    tour.screen.statement(statement)
    cursor = tour.connection.cursor()
    with stopwatch() as seconds, cursor.copy(statement.rstrip(";").encode()) as copy:
        for chunk in corpus:
            copy.write_row(astuple(chunk))
    tour.screen.answer(cursor.statusmessage or "", seconds[0])


def same_table(tour: Tour, corpus: Sequence[Chunk]) -> bool:
    if not tour.value("select to_regclass('knowledge_base') is not null"):
        return False
    model = "select model from embedding_columns where relation = 'knowledge_base'::regclass"
    if tour.value(model) != tour.model or not is_ours(tour, "knowledge_base"):
        return False
    there = tour.connection.execute("select chunk_hash from knowledge_base").fetchall()
    return {row[0] for row in there} == {chunk.chunk_hash for chunk in corpus}


def create(tour: Tour, table: str) -> None:
    schema = Path(__file__).with_name("schema.sql").read_text().replace(":dimensions", str(tour.dimensions))
    statement = next(text for text in re.split(r"\n\n", schema) if text.startswith(f"create table {table} "))
    tour.run(statement)
    tour.connection.execute(f"comment on table {table} is {tour.quoted(MARK)}".encode())


def drop(tour: Tour, table: str) -> None:
    """What a former run made; never a table that somebody else did."""
    if not tour.value("select to_regclass(%s) is not null", table):
        return
    if not is_ours(tour, table):
        raise DemoError(f"this database has a table {table} already, and it is not the demo's: name another database")
    tour.run(f"drop table {table};")


def is_ours(tour: Tour, table: str) -> bool:
    return bool(tour.value("select obj_description(%s::regclass, 'pg_class') = %s", table, MARK))


def declare(tour: Tour) -> None:
    tour.screen.title("Declare the column: from now on it is filled from these two, and kept current")
    tour.run(
        "select embed_column('knowledge_base', array['context_header', 'chunk_text'],\n"
        f"                    model => {tour.quoted(tour.model)}, if_not_exists => true);"
    )
    made = tour.run("select embed_index('knowledge_base');").fetchone()
    if made and made[0]:
        tour.screen.answer(f"made: {made[0]}")


def fill(tour: Tour) -> None:
    tour.screen.title("Fill it: batches of 32, a commit each; nobody waits meanwhile")
    cursor = tour.run("call embed_pending(32);")
    tour.screen.table([column.name for column in cursor.description or ()], cursor.fetchall())
    tour.run("analyze knowledge_base;")
    left = tour.value(
        "select pending + failed + waiting from embedding_progress where relation = 'knowledge_base'::regclass"
    )
    if left:
        raise DemoError(f"{left} chunks have no vector: see embedding_failures")


def ask(tour: Tour) -> None:
    tour.screen.title("Ask")
    for number, question in enumerate(QUESTIONS):
        if number:
            tour.screen.line()
        found = search(tour, "knowledge_base", question)
        for place, (distance, content) in enumerate(found):
            header, _, text = content.partition("\n")
            tour.screen.hit(distance, shortened(header), text, lines=3 if place == 0 else 1)


def shortened(header: str) -> str:
    return " \u203a ".join(header.split(" \u203a ")[-2:])


def search(tour: Tour, table: str, question: str) -> list[tuple[Any, ...]]:
    found = tour.run(f"select distance, content from embed_search('{table}', {tour.quoted(question)}, 3);").fetchall()
    if not found:
        raise DemoError(f"the search in {table} found nothing")
    return found


def write_and_find(tour: Tour) -> None:
    tour.screen.title("A column that is filled at once: what is written is found by the next search")
    drop(tour, "notes")
    create(tour, "notes")
    tour.run(f"select embed_column('notes', 'body', model => {tour.quoted(tour.model)}, mode => 'immediate');")
    values = ",\n                                ".join(f"({tour.quoted(note)})" for note in NOTES)
    tour.run(f"insert into notes (body) values {values};")
    found = search(tour, "notes", NOTES_QUESTION)
    for distance, content in found:
        tour.screen.hit(distance, content, "", lines=1)
    if found[0][1] != NOTES[1]:
        raise DemoError("the search did not find the row that answers")


def look(tour: Tour) -> None:
    tour.screen.title("What the server knows about it")
    tour.show("select relation, source, target, model, mode, status from embedding_columns;")
    tour.show(
        "select relation, total, embedded, pending, blank, failed, waiting, rows_per_second, time_left\n"
        "from embedding_progress;"
    )
    tour.show(
        "select to_char(minute, 'HH24:MI') as minute, relation, rows, tokens, rows_per_second,\n"
        "       claim_seconds, encode_seconds, write_seconds\nfrom embedding_throughput limit 3;"
    )
    tour.show("select relation, key, kind, message, attempts, next_try from embedding_failures;")


def cut_manual(tour: Tour, environ: Mapping[str, str]) -> list[Chunk]:
    names = environ.get("DEMO_PARTS", "").split()
    tour.screen.title("The text: PostgreSQL's own manual")
    with stopwatch() as seconds:
        parts = None if names == ["all"] else frozenset(names) or USER_PARTS
        corpus = chunks(Path(required(environ, "AUTOEMBED_DOC_DIR")), parts)
    pages = len({chunk.source_file for chunk in corpus})
    tour.screen.answer(f"{pages} pages cut into {len(corpus)} chunks, each with the path of its section", seconds[0])
    return corpus


def required(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise DemoError(f"{name} is not set: `make demo` sets it")
    return environ[name]


def tour_all(tour: Tour, environ: Mapping[str, str]) -> None:
    introduce(tour)
    find_model(tour)
    load(tour, cut_manual(tour, environ))
    for step in (declare, fill, ask, write_and_find, look):
        step(tour)


def start(environ: Mapping[str, str]) -> None:
    screen = Screen()
    with stopwatch() as seconds, psycopg.connect(required(environ, "AUTOEMBED_DSN"), autocommit=True) as connection:
        connection.add_notice_handler(lambda notice: screen.notice(notice.message_primary or ""))
        connection.execute("set client_min_messages = notice")
        tour_all(Tour(connection, screen, environ.get("DEMO_MODEL") or MODEL), environ)
    screen.line(f"\nDone in {seconds[0]:.0f} s. `make psql` opens the database: ask your own questions.")


def main() -> int:
    try:
        start(os.environ)
    except (DemoError, NoManual) as error:
        return failed(str(error))
    except psycopg.Error as error:
        hint = f"\n{error.diag.message_hint}" if error.diag.message_hint else ""
        return failed(f"{error.diag.message_primary or error}{hint}")
    except KeyboardInterrupt:
        return failed("stopped; what is embedded stays, and the next run goes on from there", status=130)
    return 0


def failed(message: str, status: int = 1) -> int:
    sys.stdout.flush()
    print(f"\ndemo: {message}", file=sys.stderr)
    return status
