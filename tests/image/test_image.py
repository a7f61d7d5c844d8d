"""The image: starts healthy, fills by psql, trigger and job, survives what containers go through, is what it says."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import docker  # type: ignore[import-untyped]
import psycopg
import pytest

from image.containers import IMAGE, MODELS, PASSWORD, Container, build, ulimits, wait_until

HERE = Path(__file__).parent
CONTROL = (HERE.parents[1] / "pg_autoembed.control").read_text()
VERSION = re.search("default_version = '(.*)'", CONTROL)[1]  # type: ignore[index]
NEXT = "9.9.9"
TABLE = "create table note (id int generated always as identity primary key, body text, embedding vector(384))"
DECLARE = "select embed_column('note', 'body')"
TEXTS = ("Vacuum gives back the room of dead rows.", "A partial index covers some rows.", "Water the plants on Friday.")
INSERT = "insert into note (body) values " + ", ".join(f"('{text}')" for text in TEXTS)
ASK = "select content from embed_search('note', 'When do flowers get their drink?', 1)"
ANSWER = TEXTS[2]
Make = Callable[..., Container]


def filled(container: Container, database: str | None = None) -> int:
    return int(container.sql("select count(embedding) from note", database))


# --- starting ------------------------------------------------------------------------------------------------------


def test_is_healthy_in_time_and_embeds_at_once(make: Make) -> None:
    container = make()
    seconds = container.wait_until_healthy(60)
    assert container.health() == (True, "ok")
    assert container.sql("select vector_dims(embed('a word'))") == "384"
    print(f"healthy after {seconds:.1f} s")  # noqa: T201


def test_is_unhealthy_while_the_cluster_is_made(make: Make) -> None:
    """The server that runs the init scripts would answer to a mere look at its socket."""
    slow = HERE / "slow_init.sql"
    container = make(mounts={str(slow): "/docker-entrypoint-initdb.d/99_slow.sql"})
    wait_until(lambda: "99_slow.sql" in container.log, 60)
    healthy, answer = container.health()
    assert not healthy
    assert "still being set up" in answer
    container.wait_until_healthy()


def test_everything_is_there(shared: Container) -> None:
    extensions = shared.sql("select extname from pg_extension order by 1").split()
    assert {"pg_autoembed", "pg_cron", "plpython3u", "vector"} <= set(extensions)
    assert shared.sql("select string_agg(check_name, ' ') from embedding_health where status <> 'ok'") == ""
    assert "loaded by the postmaster" in shared.sql("select message from embedding_health where check_name = 'preload'")
    call = "substring(command from 'call autoembed[^;]*')"
    assert shared.sql(f"select username || ': ' || {call} from cron.job where jobname like 'pg_autoembed%'") == (
        "postgres: call autoembed.tick(batch => null)"
    )


def test_no_password_no_cluster(make: Make) -> None:
    container = make(environment={"POSTGRES_PASSWORD": ""})
    wait_until(lambda: not container.running, 30)
    assert "POSTGRES_PASSWORD" in container.log


def test_asks_for_the_password_from_outside(shared: Container) -> None:
    with shared.connect() as connection:
        assert connection.execute("select 1").fetchone() == (1,)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        shared.connect("another one")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("EMBEDDING_MODEL_NAME", "no-such-model", 'model "no-such-model" is not in the model directory'),
        ("EMBEDDING_THREADS", "many", "EMBEDDING_THREADS must be a whole number"),
    ],
)
def test_broken_setting_is_a_warning_and_a_server_that_starts(make: Make, name: str, value: str, words: str) -> None:
    container = make(environment={name: value})
    wait_until(container.answers, 60)
    assert re.search(f"WARNING: .*{words}", container.log)
    assert container.sql("select 1") == "1"
    healthy, answer = container.health()
    assert not healthy
    assert re.search(f"^fail: model: .*{words}", answer, re.MULTILINE)


def test_settings_reach_the_server(make: Make) -> None:
    settings = {"EMBEDDING_MAX_SEQ_LENGTH": "64", "EMBEDDING_PRELOAD": "", "AUTOEMBED_SCHEDULE": ""}
    container = make(environment=settings)
    container.wait_until_healthy()
    query = "select value || ', ' || source from embedding_settings where name = 'EMBEDDING_MAX_SEQ_LENGTH'"
    assert container.sql(query) == "64, environment"
    assert container.sql("select status from embedding_health where check_name = 'preload'") == "warn"
    assert container.sql("select count(*) from cron.job where jobname like 'pg_autoembed%'") == "0"


def test_command_line_keeps_the_libraries(make: Make) -> None:
    container = make(command=["-c", "shared_preload_libraries=auto_explain", "-c", "work_mem=5MB"])
    container.wait_until_healthy()
    assert container.sql("show shared_preload_libraries") == "auto_explain,autoembed_preload,pg_cron"
    assert container.sql("show work_mem") == "5MB"


def test_schedule_that_is_none_is_a_warning(make: Make) -> None:
    container = make(environment={"AUTOEMBED_SCHEDULE": "now and then"})
    container.wait_until_healthy()
    assert re.search("WARNING: .*AUTOEMBED_SCHEDULE is no schedule", container.log)


def test_cluster_that_was_not_finished_is_not_served(make: Make) -> None:
    broken = make(mounts={str(HERE / "broken_init.sql"): "/docker-entrypoint-initdb.d/50_broken.sql"})
    wait_until(lambda: not broken.running, 60)
    assert "division by zero" in broken.log
    broken.remove()
    container = make(volume=broken.volume)
    wait_until(lambda: not container.running, 30)
    assert "did not get through its init scripts" in container.log


def test_any_port_and_only_a_socket(make: Make) -> None:
    container = make(command=["-c", "port=5433", "-c", "listen_addresses="])
    container.wait_until_healthy()


def test_health_runs_nobodys_code(make: Make) -> None:
    """It asks as superuser in a database where another may put functions on the path."""
    container = make(environment={"AUTOEMBED_SCHEDULE": ""})
    container.wait_until_healthy()
    container.sql("create role app login; grant create on schema public to app")
    arguments = ", ".join(["text"] * 6)
    body = "begin alter role app superuser; return $1; end"
    hostile = f"create function public.concat({arguments}) returns text language plpgsql as $f$ {body} $f$"
    container.sql(f"set role app; {hostile}")
    assert container.health()[0]
    assert container.sql("select rolsuper from pg_roles where rolname = 'app'") == "f"


# --- filling -------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(shared: Container) -> Iterator[str]:
    """A database of the shared container that no job looks at."""
    shared.sql("create database plain")
    shared.sql("create extension pg_autoembed cascade", "plain")
    shared.sql(TABLE, "plain")
    yield "plain"
    shared.sql("drop database plain with (force)")


def test_fills_by_psql(shared: Container, plain: str) -> None:
    shared.sql(f"{DECLARE}; {INSERT}", plain)
    assert filled(shared, plain) == 0
    assert shared.sql("call embed_pending(32)", plain) == f"{len(TEXTS)}|0|0|0"
    assert shared.sql(ASK, plain) == ANSWER


def test_fills_by_trigger(shared: Container, plain: str) -> None:
    shared.sql("select embed_column('note', 'body', mode => 'immediate')", plain)
    shared.sql(INSERT, plain)
    assert shared.sql(ASK, plain) == ANSWER


def test_fills_by_the_job_with_names_of_ones_own(make: Make, tmp_path: Path) -> None:
    """User, database and password file as the base image takes them, and an init script that finds the extension."""
    init, password = tmp_path / "init.sql", tmp_path / "password"
    init.write_text(f"{TABLE}; {DECLARE}; {INSERT};")
    password.write_text(PASSWORD)
    environment = {"POSTGRES_USER": "head librarian", "POSTGRES_DB": "the library", "POSTGRES_PASSWORD": None}
    environment["POSTGRES_PASSWORD_FILE"] = "/run/password"
    for file in (init, password):
        file.chmod(0o644)
    mounts = {str(init): "/docker-entrypoint-initdb.d/10_notes.sql", str(password): "/run/password"}
    container = make(environment=environment, mounts=mounts)
    container.wait_until_healthy()
    wait_until(lambda: filled(container) == len(TEXTS), 40)
    assert container.sql(ASK) == ANSWER
    assert container.sql("select distinct username || ', ' || database from cron.job") == "head librarian, the library"
    with container.connect() as connection:
        assert connection.info.dbname == "the library"


# --- living on -----------------------------------------------------------------------------------------------------


def test_survives_stop_kill_and_another_container(make: Make) -> None:
    container = make()
    container.wait_until_healthy()
    container.sql(f"{TABLE}; {DECLARE}; {INSERT}")
    container.sql("call embed_pending(32)")

    container.docker.stop(timeout=30)
    assert container.docker.wait()["StatusCode"] == 0
    assert "database system is shut down" in container.log.splitlines()[-1]
    container.start_again()
    assert container.sql(ASK) == ANSWER

    container.sql("insert into note (body) values ('written just before')")
    container.docker.kill()
    wait_until(lambda: not container.running, 30)
    container.start_again()
    assert container.sql("select count(*) from note") == str(len(TEXTS) + 1)
    wait_until(lambda: filled(container) == len(TEXTS) + 1, 40)  # by the job, which is still there

    container.remove()
    another = make(volume=container.volume, environment={"POSTGRES_PASSWORD": ""})
    another.wait_until_healthy()
    assert another.sql(ASK) == ANSWER


@pytest.fixture
def volume() -> Iterator[str]:
    """Beside the data's; empty at first."""
    made = docker.from_env().volumes.create()
    yield str(made.name)
    made.remove()


def test_read_only_without_network_and_privileges(volume: str, make: Make) -> None:
    """The socket's directory is a volume, which keeps the image's owner, as not every engine's tmpfs does."""
    container = make(
        read_only=True,
        network_mode="none",
        mounts={volume: "/run/postgresql"},
        tmpfs=["/tmp"],
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
    )
    container.wait_until_healthy()
    container.sql(f"{TABLE}; {DECLARE}; {INSERT}")
    wait_until(lambda: filled(container) == len(TEXTS), 40)
    assert container.sql(ASK) == ANSWER
    assert container.run("sh", "-c", "echo >/usr/local/written", user="root")[0] != 0


def test_started_as_root_it_takes_a_folder_of_roots(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o755)
    container = make(user="root", mounts={str(folder): "/data"}, environment={"PGDATA": "/data/17"})
    container.wait_until_healthy()
    assert container.run("stat", "-c", "%U", "/data/17", "/proc/1")[1].split() == ["postgres", "postgres"]


def test_models_can_be_a_volume(volume: str, make: Make) -> None:
    """An empty volume gets the image's model; the container cannot change it."""
    container = make(mounts={volume: MODELS})
    container.wait_until_healthy()
    assert container.sql("select name from embedding_models") == "all-MiniLM-L6-v2"
    assert container.run("touch", f"{MODELS}/written")[0] != 0


# --- upgrading -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old_volume() -> Iterator[str]:
    """What a container of the present image has left behind: two databases with the extension, one with filled rows."""
    container = Container()
    container.wait_until_healthy()
    container.sql(f"{TABLE}; {DECLARE}; {INSERT}")
    container.sql("call embed_pending(32)")
    container.sql("create database another")
    container.sql("create extension pg_autoembed cascade", "another")
    container.docker.stop(timeout=30)
    yield container.volume
    container.destroy()


def copy(volume: str) -> str:
    client = docker.from_env()
    twin = str(client.volumes.create().name)
    mounts = {volume: {"bind": "/from", "mode": "ro"}, twin: {"bind": "/to", "mode": "rw"}}
    copying = ["sh", "-c", "cp -aT /from /to"]
    client.containers.run(IMAGE, entrypoint=copying, volumes=mounts, user="root", remove=True, ulimits=ulimits())
    return twin


def next_release(tag: str, **arguments: str) -> str:
    return build(HERE / "next", f"pg_autoembed_test_{tag}", IMAGE=IMAGE, NEXT=NEXT, **arguments)


def extension_version(container: Container, database: str | None = None) -> str:
    return container.sql("select extversion from pg_extension where extname = 'pg_autoembed'", database)


def test_a_new_image_updates_an_old_volume(make: Make, old_volume: str) -> None:
    container = make(image=next_release("next"), volume=copy(old_volume), environment={"EMBEDDING_PRELOAD": ""})
    container.wait_until_healthy()
    assert extension_version(container) == NEXT
    assert extension_version(container, "another") == NEXT
    assert container.sql("select embed_release()") == NEXT
    assert container.sql(ASK) == ANSWER
    container.sql("insert into note (body) values ('written after the update')")
    wait_until(lambda: filled(container) == len(TEXTS) + 1, 40)
    before = container.log.count("is an update due")
    container.docker.restart(timeout=30)
    container.wait_until_healthy()
    assert container.log.count("is an update due") == before == 1


def test_an_update_that_fails_is_a_warning_and_a_server_that_starts(make: Make, old_volume: str) -> None:
    spoiled = next_release("spoiled", SPOILED="yes")
    container = make(image=spoiled, volume=copy(old_volume), environment={"EMBEDDING_PRELOAD": ""})
    wait_until(container.answers, 60)
    assert "division by zero" in container.log
    assert re.search("WARNING: .*ALTER EXTENSION pg_autoembed UPDATE", container.log)
    assert container.sql("select count(embedding) from note") == str(len(TEXTS))
    assert not container.health()[0]


def test_a_volume_of_the_base_image_gets_the_libraries(make: Make) -> None:
    labels = docker.from_env().images.get(IMAGE).labels
    base = make(image=labels["org.opencontainers.image.base.name"])
    wait_until(base.answers, 60)
    base.docker.stop(timeout=30)
    base.remove()
    container = make(volume=base.volume)
    wait_until(container.answers, 60)
    assert "extension pg_autoembed is not in database postgres" in container.health()[1]
    container.sql("create extension pg_autoembed cascade; create extension pg_cron")
    container.wait_until_healthy(10)
    container.sql(f"{TABLE}; {DECLARE}; {INSERT}; select * from embed_schedule('1 second')")
    wait_until(lambda: filled(container) == len(TEXTS), 40)


# --- what the image is ---------------------------------------------------------------------------------------------


def test_runs_as_postgres(shared: Container) -> None:
    assert shared.run("id", "-un")[1] == "postgres"
    assert set(shared.run("sh", "-c", "stat -c %U /proc/[0-9]*")[1].split()) == {"postgres"}


def test_no_compiler_and_no_cache_is_left(shared: Container) -> None:
    tools = ["gcc", "cc", "g++", "make", "ld", "pip", "git", "curl", "wget"]
    assert shared.run("which", *tools)[1] == ""
    kept = "/src /stage /package /model ~root/.cache /run/secrets"
    kept += " /var/cache/pip /var/lib/apt/lists /var/cache/apt/archives"
    found = shared.run("sh", "-c", f"find {kept} -type f 2>/dev/null | grep -v lock$", user="root")[1]
    assert found == ""
    assert shared.run("find", "/", "-xdev", "-name", "*.whl", user="root")[1] == ""


def test_labels_say_what_it_is() -> None:
    labels = docker.from_env().images.get(IMAGE).labels
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}version"] == VERSION
    assert labels[f"{prefix}licenses"] == "PostgreSQL"
    assert all(labels[prefix + name] for name in ("title", "description", "revision", "base.name"))


def lent_lines(shared: Container) -> list[bytes]:
    """A few lines of what the build was lent, such as a certificate of one's own, that the base does not have."""
    have = shared.run("cat", "/etc/ssl/certs/ca-certificates.crt")[1]
    lent = [os.environ.get(name, "") for name in ("PIP_CERT", "SSL_CERT_FILE", "PIP_CONFIG_FILE")]
    texts = [Path(file).read_text() for file in lent if file and Path(file).is_file()]
    own = [
        [line.strip() for line in text.splitlines() if len(line) > 30 and line.strip() not in have] for text in texts
    ]
    return [line.encode() for lines in own for line in (*lines[:1], *lines[-4:])]


def test_no_secret_in_its_layers(shared: Container) -> None:
    image = docker.from_env().images.get(IMAGE)
    told = " ".join([*image.attrs["Config"]["Env"], *(layer["CreatedBy"] or "" for layer in image.history())])
    assert not re.search(r"(?i)(password|token|secret)=|://[^/ ]+:[^/ ]+@", told)
    secrets = [PASSWORD.encode(), *lent_lines(shared)]
    former = b""
    for chunk in image.save(chunk_size=8 << 20):
        text = former + chunk
        assert not [secret for secret in secrets if secret in text]
        former = chunk[-200:]
