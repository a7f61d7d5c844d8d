"""Preloading: one load in the postmaster, inherited by every session; and a server that starts whatever goes wrong."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psycopg
import pytest

from models_for_tests import tiny_mpnet, write_json
from support.server import Connection, Server, add_model, pg_config, site, wait_until
from support.talk import column, notices, refusal, scalar

MINILM = "all-MiniLM-L6-v2"
LIBRARY = {"shared_preload_libraries": "autoembed_preload"}
LIMIT_MB = 60
MODULES = """
create or replace function pg_temp.modules() returns text[] language plpython3u as $$
import sys
return list(sys.modules)
$$
"""
NO_LOADING = """
do language plpython3u $$
plpy.execute("select autoembed.start()")
from autoembed.encoding.packed.encoder import PackedEncoder
PackedEncoder.load = None
$$
"""
TWO_THREADS = """
create or replace function pg_temp.two_threads() returns int language plpython3u as $$
import os, torch
torch.set_num_threads(2)
torch.mm(torch.rand(1024, 1024), torch.rand(1024, 1024))
return len(os.listdir("/proc/self/task"))
$$
"""
THREADS = """
create or replace function pg_temp.threads() returns int language plpython3u as $$
import torch
return torch.get_num_threads()
$$
"""
DRAW = """
create or replace function pg_temp.draw() returns text language plpython3u as $$
import random
return str(random.random())
$$
"""
EXIT = "do language plpython3u 'import ctypes; ctypes.CDLL(None).exit(0)'"


@pytest.fixture(scope="module")
def directory(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of this module's own: its models are changed."""
    made = tmp_path_factory.mktemp("preload")
    directory = Path(shutil.copytree(model_dir / MINILM, made / "models" / MINILM)).parent
    add_model(directory, tiny_mpnet(made), "tiny-kept")
    for name in ("tiny-changed", "tiny-replaced", "tiny-broken"):
        shutil.copytree(directory / "tiny-kept", directory / name)
    return directory


@pytest.fixture(scope="module")
def preloading(
    directory: Path, server_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server that has preloaded MiniLM and three tiny models; sessions have two threads."""
    environment = server_environment | {
        "EMBEDDING_MODEL_DIR": str(directory),
        "EMBEDDING_THREADS": "2",
        "EMBEDDING_PRELOAD": f"{MINILM}, tiny-changed,tiny-replaced,tiny-kept",
    }
    settings = LIBRARY | {"autovacuum_naptime": "1s", "restart_after_crash": "on", "max_connections": 30}
    own = Server(tmp_path_factory.mktemp("preloading") / "server", environment, settings)
    own.create()
    yield own
    own.destroy()


@pytest.fixture
def session(preloading: Server) -> Iterator[Connection]:
    with preloading.connect() as connection:
        yield connection


def tasks(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def private_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def vector(connection: Connection, text: str, model: str = MINILM) -> np.ndarray:
    return np.array(scalar(connection, "select embed(%s, %s)::real[]", [text, model]))


def model_in_use(connection: Connection, name: str) -> str:
    """Its fingerprint."""
    with notices(connection) as heard:
        code = f"plpy.notice(GD['autoembed models'].by_name['{name}'].encoder.model.fingerprint)"
        connection.execute(f"do language plpython3u $$ {code} $$".encode())
    return str(heard[0].message)


def preload_setting(connection: Connection) -> str:
    return str(scalar(connection, "select source from embedding_settings where name = 'EMBEDDING_PRELOAD'"))


# --- what sessions inherit -----------------------------------------------------------------------------------------


def test_first_embedding_imports_and_loads_nothing(session: Connection) -> None:
    session.execute(MODULES)
    before = set(scalar(session, "select pg_temp.modules()"))
    assert "torch" in before
    session.execute(NO_LOADING)
    assert len(vector(session, "hello")) == 384
    assert set(scalar(session, "select pg_temp.modules()")) - before == set()


def test_vectors_are_those_of_a_cold_session(session: Connection, db: Connection) -> None:
    for text in ("hello", "Vacuum gives back the room that dead rows take. " * 30):
        assert np.allclose(vector(session, text), vector(db, text), atol=1e-5)


def test_private_memory_of_a_session(session: Connection) -> None:
    for number in range(100):
        vector(session, f"question {number}")
    before = private_mb(session.info.backend_pid)
    assert before < LIMIT_MB
    session.execute("do 'import gc; gc.collect()' language plpython3u")  # as at the end of each fill
    assert private_mb(session.info.backend_pid) < before + 10


def test_postmaster_has_one_thread_and_no_cuda(preloading: Server) -> None:
    assert tasks(preloading.pid) == 1
    assert "libcuda" not in Path(f"/proc/{preloading.pid}/maps").read_text()


def test_threads_start_after_the_fork(preloading: Server) -> None:
    """A parallel operation in the postmaster would have every child hang at its first."""
    connection = preloading.connect()
    found: list[int] = []

    def compute() -> None:
        connection.execute(TWO_THREADS)
        found.append(scalar(connection, "select pg_temp.two_threads()"))

    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    thread.join(timeout=30)
    if thread.is_alive():
        os.kill(connection.info.backend_pid, 9)
    assert found == [2]
    connection.close()


def test_session_encodes_with_its_own_threads(session: Connection) -> None:
    vector(session, "Vacuum gives back the room that dead rows take. " * 30)
    session.execute(THREADS)
    assert scalar(session, "select pg_temp.threads()") == 2


def test_closing_keeps_the_weights(session: Connection) -> None:
    first = vector(session, "hello", "tiny-kept")
    session.execute("select embed_unload()")
    session.execute(NO_LOADING)
    assert np.array_equal(vector(session, "hello", "tiny-kept"), first)


def test_log_says_what_was_preloaded(preloading: Server, session: Connection) -> None:
    line = r"LOG:  embedding model (\S+) is preloaded: fingerprint (\w{12}), (\d+) MB, \d+ ms$"
    said = re.findall(line, preloading.log, re.MULTILINE)
    assert [name for name, *_ in said] == [MINILM, "tiny-changed", "tiny-replaced", "tiny-kept"]
    about = "select array[left(fingerprint, 12), (bytes >> 20)::text] from embedding_models where name = %s"
    assert said[0][1:] == tuple(scalar(session, about, [MINILM]))
    assert "no embedding model" not in preloading.log


def test_settings_say_what_is_preloaded(session: Connection) -> None:
    source = preload_setting(session)
    assert source.startswith("environment; loaded by the postmaster in ")
    assert source.endswith(f": {MINILM}, tiny-changed, tiny-replaced, tiny-kept")


# --- a model that changes afterwards -------------------------------------------------------------------------------


def test_files_written_over_are_noticed(session: Connection, directory: Path) -> None:
    with (directory / "tiny-changed" / "config.json").open("a") as file:
        file.write(" ")
    error = refusal(session, "select embed('hello', 'tiny-changed')")
    assert error.sqlstate == "55000"
    assert "was changed after it was added: config.json" in str(error)


def test_replaced_model_is_loaded_anew(
    preloading: Server, session: Connection, directory: Path, tmp_path: Path
) -> None:
    assert len(vector(session, "hello", "tiny-replaced")) == 32
    former = model_in_use(session, "tiny-replaced")
    folder = tiny_mpnet(tmp_path, "tiny-replaced")
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 40, "do_lower_case": False})
    command = [str(site() / "bin" / "python"), "-I", "-m", "autoembed", "model", "add", str(folder), "--force"]
    subprocess.run(command, env=os.environ | {"EMBEDDING_MODEL_DIR": str(directory)}, check=True)
    with preloading.connect() as later:
        for each in (session, later):
            vector(each, "hello", "tiny-replaced")
            now = scalar(each, "select fingerprint from embedding_models where name = 'tiny-replaced'")
            assert model_in_use(each, "tiny-replaced") == now != former


# --- what else the postmaster forks --------------------------------------------------------------------------------


def test_other_processes_are_unharmed(preloading: Server, session: Connection) -> None:
    session.execute("create table busy as select g as id, repeat('x', 20) as filler from generate_series(1, 20000) g")
    session.execute("set max_parallel_workers_per_gather = 2; set parallel_setup_cost = 0; set parallel_tuple_cost = 0")
    session.execute("set min_parallel_table_scan_size = 0")
    plan = column(session, "explain (analyze, costs off) select count(*) from busy where id % 7 = 0")
    assert any("Workers Launched: 2" in line for line in plan)
    vacuumed = "select last_autovacuum is not null from pg_stat_user_tables where relname = 'busy'"
    session.execute("delete from busy where id % 2 = 0")
    wait_until(lambda: scalar(session, vacuumed))
    session.execute("select pg_reload_conf()")
    wait_until(lambda: "received SIGHUP" in preloading.log)
    assert "WARNING" not in preloading.log


def test_exit_without_postgresqls_leave_is_cleaned_up(preloading: Server) -> None:
    """libc's exit() called by somebody's library: the server takes it for a session's end, as without preloading."""
    connection = preloading.connect()
    with pytest.raises(psycopg.OperationalError):
        connection.execute(EXIT)
    connection.close()
    with preloading.connect() as connection:
        assert scalar(connection, "select 1") == 1
    assert "terminating any other active server processes" not in preloading.log


def test_crash_leaves_the_models_in_place(preloading: Server) -> None:
    before = preloading.pid
    victim = preloading.connect()
    os.kill(victim.info.backend_pid, 9)
    wait_until(lambda: "all server processes terminated; reinitializing" in preloading.log)
    victim.close()
    preloading.wait_until_ready()
    with preloading.connect() as connection:
        connection.execute(NO_LOADING)
        assert len(vector(connection, "hello")) == 384
    assert preloading.pid == before
    assert tasks(before) == 1


# --- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def troubled(
    directory: Path, server_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server to be started again and again, each time with something else wrong."""
    environment = server_environment | {"EMBEDDING_MODEL_DIR": str(directory)}
    own = Server(tmp_path_factory.mktemp("troubled") / "server", environment, {"autovacuum_naptime": "1s"} | LIBRARY)
    own.create()
    own.stop()
    yield own
    own.destroy()


@pytest.fixture
def start(troubled: Server) -> Iterator[Callable[..., str]]:
    """start(EMBEDDING_X="...") starts it so and returns what it has logged on the way."""
    usual = dict(troubled.environment)

    def begin(**environment: str) -> str:
        before = len(troubled.log)
        troubled.environment |= environment
        troubled.start()
        return troubled.log[before:]

    yield begin
    troubled.stop()
    troubled.environment = usual


def test_models_that_cannot_be_loaded(
    start: Callable[..., str], troubled: Server, directory: Path, tmp_path: Path
) -> None:
    with (directory / "tiny-broken" / "model.safetensors").open("r+b") as weights:
        weights.truncate(100)
    said = start(EMBEDDING_PRELOAD="no-such,tiny-broken,tiny-kept")
    assert 'WARNING:  embedding model no-such was not preloaded: model "no-such" is not in the model directory' in said
    assert "WARNING:  embedding model tiny-broken was not preloaded" in said
    with troubled.connect() as connection:
        source = preload_setting(connection)
        assert source.count(" not loaded: ") == 2
        assert "loaded by the postmaster" in source
        connection.execute(NO_LOADING)
        assert len(vector(connection, "hello", "tiny-kept")) == 32
    assert tasks(troubled.pid) == 1


def test_error_in_the_block_leaves_nothing_behind(
    start: Callable[..., str], troubled: Server, server_environment: dict[str, str], tmp_path: Path
) -> None:
    """Were SPI's stack not cleaned, all later processes would complain of it."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['autoembed.server.postmaster'] = None\n")
    said = start(EMBEDDING_PRELOAD="tiny-kept", PYTHONPATH=str(tmp_path))
    assert (
        "WARNING:  no embedding model was preloaded: ModuleNotFoundError: import of autoembed.server.postmaster halted"
        in said
    )
    with troubled.connect() as connection:
        connection.execute("create table later as select generate_series(1, 1000) as id")
        connection.execute("delete from later")
        connection.execute("do language plpython3u $$ plpy.execute('select 1') $$")
        vacuumed = "select last_autovacuum is not null from pg_stat_user_tables where relname = 'later'"
        wait_until(lambda: scalar(connection, vacuumed))
    assert "SPI stack" not in troubled.log


def test_python_that_does_not_start(start: Callable[..., str], troubled: Server) -> None:
    said = start(EMBEDDING_PRELOAD="tiny-kept", PYTHONHOME="/nowhere")
    assert "WARNING:  no embedding model was preloaded: Python does not start" in said
    assert (troubled.directory / "data" / "postmaster.pid").exists()
    with troubled.connect() as connection:
        assert scalar(connection, "select 1") == 1


def test_wrong_setting(start: Callable[..., str], troubled: Server) -> None:
    said = start(EMBEDDING_PRELOAD="tiny-kept", EMBEDDING_BATCH_SIZE="many")
    assert "WARNING:  no embedding model was preloaded: EMBEDDING_BATCH_SIZE must be a whole number" in said


def test_nothing_named(start: Callable[..., str], troubled: Server) -> None:
    assert "embedding model" not in start(EMBEDDING_PRELOAD=" ")
    assert "libpython" not in Path(f"/proc/{troubled.pid}/maps").read_text()
    with troubled.connect() as connection:
        assert len(vector(connection, "hello", "tiny-kept")) == 32


def test_named_without_the_library(start: Callable[..., str], troubled: Server) -> None:
    troubled.settings.pop("shared_preload_libraries")
    start(EMBEDDING_PRELOAD="tiny-kept")
    troubled.settings |= LIBRARY
    with troubled.connect() as connection:
        assert "shared_preload_libraries has no autoembed_preload" in preload_setting(connection)
        assert len(vector(connection, "hello", "tiny-kept")) == 32


# --- other ways to run postgres ------------------------------------------------------------------------------------


def command(server: Server, *options: str, program: Path | None = None) -> tuple[list[str], dict[str, str]]:
    """Its own program, unless another is named; and its environment, with a model to preload that is not there."""
    words = [str(program or pg_config("--bindir") / "postgres"), *options, "-D", str(server.directory / "data")]
    settings = ("shared_preload_libraries=autoembed_preload", f"unix_socket_directories={server.sockets}")
    words += [word for setting in settings for word in ("-c", setting)]
    return words, os.environ | server.environment | {"EMBEDDING_PRELOAD": "no-such"}


def log_of_a_start(server: Server, *options: str, program: Path | None = None) -> str:
    """What a server says until it takes connections; it is stopped then."""
    words, environment = command(server, "-c", "listen_addresses=", *options, program=program)
    said = []
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if "ready to accept connections" in line:
                process.send_signal(signal.SIGINT)
    assert process.returncode == 0
    return "".join(said)


def test_nothing_runs_under_pg_upgrade(troubled: Server) -> None:
    assert "no-such was not preloaded" in log_of_a_start(troubled)
    assert "preloaded" not in log_of_a_start(troubled, "-b")


def test_nothing_runs_in_single_user_mode(troubled: Server) -> None:
    words, environment = command(troubled, "--single")
    statement = "select 'alive';\n"
    done = subprocess.run(
        [*words, "postgres"], env=environment, input=statement, capture_output=True, text=True, check=True
    )
    assert "alive" in done.stdout
    assert "preloaded" not in done.stdout + done.stderr


def test_no_plpython(troubled: Server, tmp_path: Path) -> None:
    """A PostgreSQL at another place, which finds its libraries there: all but PL/Python."""
    places = {option: pg_config(f"--{option}") for option in ("bindir", "pkglibdir", "sharedir")}
    root = Path(os.path.commonpath(places.values()))
    there = {option: tmp_path / path.relative_to(root) for option, path in places.items()}
    without = shutil.ignore_patterns("plpython3.so", "pg_autoembed", "bitcode")
    shutil.copytree(places["pkglibdir"], there["pkglibdir"], copy_function=os.symlink, ignore=without)
    for option in ("bindir", "sharedir"):
        there[option].parent.mkdir(parents=True, exist_ok=True)
    there["sharedir"].symlink_to(places["sharedir"])
    there["bindir"].mkdir(exist_ok=True)
    program = Path(shutil.copy(places["bindir"] / "postgres", there["bindir"]))
    said = log_of_a_start(troubled, program=program)
    assert "WARNING:  no embedding model was preloaded: could not access file" in said


def test_sessions_draw_numbers_of_their_own(preloading: Server) -> None:
    """Whose seed the postmaster had set would be everybody's."""
    drawn = set()
    for _ in range(3):
        with preloading.connect() as connection:
            connection.execute(DRAW)
            drawn.add(scalar(connection, "select pg_temp.draw()"))
    assert len(drawn) == 3
