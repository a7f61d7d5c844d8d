"""What is measured in processes of its own: `python -m bench.fresh PROGRAM` takes arguments and prints figures as JSON.

Nothing heavy is imported above the programs: a cold start counts it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BATCH = 32
QUERY = "how does vacuum free the space of dead rows"


def run(program: str, **arguments: Any) -> dict[str, Any]:
    with start(program, **arguments) as process:
        found: dict[str, Any] = json.loads(process.communicate()[0])
    return found


def start(program: str, **arguments: Any) -> "subprocess.Popen[str]":
    line = json.dumps({"started": time.monotonic(), **arguments})
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.fresh", program],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    tell(process, line)
    return process


def tell(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def cold_start(started: float, directory: str, name: str) -> dict[str, float]:
    """Of a process whose first text is encoded by the extension's package."""
    begun = time.monotonic()
    from autoembed import settings
    from autoembed.encoding import batching
    from autoembed.process import environment as process_environment
    from autoembed.process import memory

    process_environment.set_environment()
    with memory.uncollected():  # as loading does, which would import them
        from autoembed.encoding.load import load_encoder
        from autoembed.encoding.packed import encoder as packed  # noqa: F401
        from autoembed.models import directory as model_directory

    imported = time.monotonic()
    current = settings.read({"EMBEDDING_MODEL_DIR": directory, "EMBEDDING_DEVICE": "cpu"})
    encoder = load_encoder(model_directory.find(current, name), current)
    loaded = time.monotonic()
    batching.encode_all(encoder, [QUERY], prompt="", checkpoint=lambda: None)
    return _stages(started, begun, imported, loaded)


def cold_reference(started: float, folder: str) -> dict[str, float]:
    begun = time.monotonic()
    from sentence_transformers import SentenceTransformer

    imported = time.monotonic()
    encoder = SentenceTransformer(folder, device="cpu", local_files_only=True)
    loaded = time.monotonic()
    encoder.encode([QUERY], show_progress_bar=False)
    return _stages(started, begun, imported, loaded)


def _stages(started: float, begun: float, imported: float, loaded: float) -> dict[str, float]:
    ended = time.monotonic()
    stages = {"import": imported - begun, "load": loaded - imported, "text": ended - loaded}
    return {**stages, "total": ended - started}


def memory(started: float, directory: str, name: str, texts: list[str]) -> dict[str, float]:  # noqa: ARG001
    """Megabytes: the peak while encoding, above the resident pages of the model's mapped files and above idling."""
    encoder = open_encoder(directory, name)
    _encode(encoder, texts[:1])
    encoder.free_memory()
    idle = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    begun = time.monotonic()
    for some in _batches(texts):
        _encode(encoder, some)
    took = time.monotonic() - begun
    peak, weights = status("VmHWM"), mapped(Path(directory) / name)
    encoder.free_memory()
    return {
        "peak": peak,
        "weights": weights,
        "above_weights": peak - weights,
        "above_idle": peak - idle,
        "after": resident() - idle,
        "seconds_a_text": took / len(texts),
    }


def growth(started: float, directory: str, name: str, texts: list[str], count: int) -> dict[str, float]:  # noqa: ARG001
    """Megabytes between the first tenth of so many texts and the last."""
    encoder = open_encoder(directory, name)
    every = list(islice(cycle(texts), count))
    _encode_all(encoder, every[: count // 10])
    before = resident()
    _encode_all(encoder, every[count // 10 :])
    return {"before": before, "grown": resident() - before}


def worker(started: float, directory: str, name: str, texts: list[str], threads: int | None, seconds: float) -> Any:  # noqa: ARG001
    """Waits for a line, encodes for so many seconds, says how many texts it took a second."""
    encoder = open_encoder(directory, name, threads)
    _encode(encoder, texts[:4])
    print("ready", flush=True)
    sys.stdin.readline()
    begun = time.monotonic()
    done = 0
    for some in cycle(_batches(texts, 8)):  # a whole batch of four processes would take half a minute
        _encode(encoder, some)
        done += len(some)
        if time.monotonic() - begun >= seconds:
            break
    return {"texts_per_second": done / (time.monotonic() - begun)}


def alone(started: float, directory: str, name: str, texts: list[str]) -> dict[str, float]:  # noqa: ARG001
    """Texts a second, in batches of 32 as they come."""
    encoder = open_encoder(directory, name)
    _encode(encoder, texts[:4])
    begun = time.monotonic()
    for some in _batches(texts):
        _encode(encoder, some)
    return {"texts_per_second": len(texts) / (time.monotonic() - begun)}


def open_encoder(directory: str, name: str, threads: int | None = None) -> Any:
    from autoembed import settings
    from autoembed.encoding.load import load_encoder
    from autoembed.models import directory as model_directory

    environment = {"EMBEDDING_MODEL_DIR": directory, "EMBEDDING_DEVICE": "cpu"}
    if threads is not None:
        environment["EMBEDDING_THREADS"] = str(threads)
    current = settings.read(environment)
    return load_encoder(model_directory.find(current, name), current)


def _encode_all(encoder: Any, texts: list[str]) -> None:
    for some in _batches(texts):
        _encode(encoder, some)
    encoder.free_memory()


def _encode(encoder: Any, texts: list[str]) -> None:
    from autoembed.encoding import batching

    batching.encode_all(encoder, texts, prompt="", checkpoint=lambda: None)


def _batches(texts: list[str], size: int = BATCH) -> Iterator[list[str]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))


def resident() -> float:
    return status("VmRSS")


def status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def mapped(folder: Path) -> float:
    """Resident megabytes of the files below a folder that this process has mapped."""
    pages, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            counted = str(folder) in line
        elif counted and line.startswith("Rss:"):
            pages += int(line.split()[1])
    return pages / 1024


PROGRAMS = {program.__name__: program for program in (cold_start, cold_reference, memory, growth, worker, alone)}

if __name__ == "__main__":
    print(json.dumps(PROGRAMS[sys.argv[1]](**json.loads(sys.stdin.readline()))), flush=True)
