"""Runs the sections asked for, prints each as text and all as markdown, keeps the figures in results.json.

AUTOEMBED_DSN       the database (libpq keywords or URI): a schema autoembed_bench is made in it
AUTOEMBED_DOC_DIR   the PostgreSQL manual's HTML, or a folder above it
AUTOEMBED_STATE     where results.json and the yardstick's model go: .pg/ or build/ in the checkout unless named
"""

import argparse
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import cast

import psycopg
from demo.manual import NoManual

from bench.database import BenchError
from bench.report import Table, keep

SECTIONS = ("pipeline", "writes", "recall", "yardstick")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; all unless named")
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="of pipeline and recall (%(default)s)")
    parser.add_argument("--rows", type=int, default=1024, help="pipeline: how many chunks (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="pipeline: how often each is measured (%(default)s)")
    parser.add_argument("--copy-rows", type=int, default=100_000, help="writes: rows of the COPY (%(default)s)")
    parser.add_argument("--update-rows", type=int, default=20_000, help="writes: rows of an UPDATE (%(default)s)")
    parser.add_argument("--write-rounds", type=int, default=7, help="writes: how often each is measured (%(default)s)")
    parser.add_argument("--topics", type=int, default=10_000, help="recall: at least how many sections (all)")
    parser.add_argument("--texts", type=int, default=96, help="yardstick: how many texts (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="yardstick: threads (%(default)s)")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return options


def measure(section: str, options: argparse.Namespace) -> Table:
    module = import_module(f"bench.{section}")  # only what is asked for: torch alone takes seconds to import
    return cast("Callable[[argparse.Namespace], Table]", getattr(module, section))(options)


def run(options: argparse.Namespace) -> None:
    tables = []
    for section in options.sections or SECTIONS:
        tables.append(measure(section, options))
        file = keep({section: tables[-1].figures | {"notes": tables[-1].notes}})
        print(f"\n{tables[-1].text()}", flush=True)
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
