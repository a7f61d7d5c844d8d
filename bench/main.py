"""Runs the sections asked for, prints each as text and all as markdown, keeps the figures in bench/results.json.

AUTOEMBED_DSN       the database (libpq keywords or URI): a schema autoembed_bench is made in it
AUTOEMBED_DOC_DIR   the PostgreSQL manual's HTML, or a folder above it
AUTOEMBED_STATE     where results.json and the encoder's models go: .pg/ or build/ in the checkout unless named
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import cast

import psycopg
from demo.manual import NoManual

from bench.database import BenchError
from bench.report import Table, keep

SECTIONS = ("pipeline", "writes", "scale", "recall", "freshness", "cold", "encoder")
ENCODER_PARTS = ("speed", "query", "cold", "memory", "minilm", "codebert", "sizes", "workers")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; all unless named")
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="writes, scale, freshness (%(default)s)")
    parser.add_argument("--rows", type=int, default=128, help="pipeline: rows for the large model (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="encoder, pipeline: rounds (%(default)s)")
    parser.add_argument("--copy-rows", type=int, default=100_000, help="writes: rows of the COPY (%(default)s)")
    parser.add_argument("--update-rows", type=int, default=20_000, help="writes: rows of an UPDATE (%(default)s)")
    parser.add_argument("--write-rounds", type=int, default=7, help="writes: how often each is measured (%(default)s)")
    parser.add_argument("--scale-rows", type=int, default=2_000_000, help="scale: the large table (%(default)s)")
    parser.add_argument("--failed-rows", type=int, default=300_000, help="scale: rows that failed (%(default)s)")
    parser.add_argument("--busy-seconds", type=int, default=15, help="scale: each of the client's runs (%(default)s)")
    parser.add_argument("--topics", type=int, default=10_000, help="recall: at least how many sections (all)")
    parser.add_argument("--cold-sessions", type=int, default=10, help="cold: how many fresh sessions (%(default)s)")
    parser.add_argument("--fresh-rows", type=int, default=100, help="freshness: rows one by one (%(default)s)")
    parser.add_argument("--precision", type=names, default=["float32", "int8"], help="by commas (float32,int8)")
    parser.add_argument("--texts", type=int, default=96, help="encoder: how many texts (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="encoder: threads (%(default)s)")
    parser.add_argument("--parts", type=names, help=f"encoder: by commas, {', '.join(ENCODER_PARTS)}; all unless named")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if unknown := set(options.parts or ()) - set(ENCODER_PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(ENCODER_PARTS)}")
    return options


def names(text: str) -> list[str]:
    return text.split(",")


def measure(section: str, options: argparse.Namespace) -> Iterable[Table]:
    module = import_module(f"bench.{section}")  # only what is asked for: torch alone takes seconds to import
    found = cast("Callable[[argparse.Namespace], Table | Iterable[Table]]", getattr(module, section))(options)
    return [found] if isinstance(found, Table) else found


def run(options: argparse.Namespace) -> None:
    tables = []
    for section in options.sections or SECTIONS:
        for table in measure(section, options):
            file = keep(section, table)
            tables.append(table)
            print(f"\n{table.text()}", flush=True)
    print("\nThe same as markdown:\n")
    print("\n\n".join(table.markdown() for table in tables))
    print(f"\nFigures: {file}")


def main() -> int:
    try:
        run(arguments())
    except (BenchError, NoManual) as error:
        return failed(str(error))
    except psycopg.Error as error:
        return failed(str(error.diag.message_primary or error))
    except KeyboardInterrupt:
        return failed("stopped", status=130)
    return 0


def failed(message: str, status: int = 1) -> int:
    print(f"\nbench: {message}", file=sys.stderr)
    return status
