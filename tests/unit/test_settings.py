from pathlib import Path

import pytest

from autoembed import settings
from autoembed.errors import InvalidSetting


def test_defaults_need_no_environment() -> None:
    read = settings.read({})
    assert read.model_dir == Path("/var/lib/pg_autoembed/models")
    assert (read.model_name, read.batch_size, read.device, read.precision) == (None, 32, "auto", "float32")
    assert (read.max_seq_length, read.dimensions, read.threads, read.max_memory_mb) == (None, None, None, None)
    assert (read.preload, read.immediate_rows) == ((), 128)


def test_every_variable_is_read() -> None:
    read = settings.read(
        {
            "EMBEDDING_MODEL_NAME": "all-MiniLM-L6-v2",
            "EMBEDDING_MODEL_DIR": "/srv/models",
            "EMBEDDING_BATCH_SIZE": "64",
            "EMBEDDING_DEVICE": "CPU",
            "EMBEDDING_MAX_SEQ_LENGTH": "128",
            "EMBEDDING_DIMENSIONS": "384",
            "EMBEDDING_THREADS": "2",
            "EMBEDDING_PRECISION": "int8",
            "EMBEDDING_MAX_MEMORY_MB": "2048",
            "EMBEDDING_MAX_MODELS": "5",
            "EMBEDDING_PRELOAD": "one, two,",
            "EMBEDDING_IMMEDIATE_ROWS": "0",
        }
    )
    assert read == settings.Settings(
        "all-MiniLM-L6-v2", Path("/srv/models"), 64, "cpu", 128, 384, 2, "int8", 2048, 5, ("one", "two"), 0
    )


def test_empty_is_unset() -> None:
    assert settings.read({"EMBEDDING_THREADS": " ", "EMBEDDING_MODEL_NAME": ""}) == settings.read({})


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("EMBEDDING_BATCH_SIZE", "0", "from 1 to 512"),
        ("EMBEDDING_BATCH_SIZE", "many", "whole number"),
        ("EMBEDDING_BATCH_SIZE", "٣", "whole number"),
        ("EMBEDDING_THREADS", "-1", "whole number"),
        ("EMBEDDING_DIMENSIONS", "16001", "from 1 to 16000"),
        ("EMBEDDING_DEVICE", "tpu", "auto or cpu or cuda or cuda:N or mps"),
        ("EMBEDDING_DEVICE", "cuda:", "cuda:N"),
        ("EMBEDDING_DEVICE", "cuda:N", "cuda:N"),
        ("EMBEDDING_DEVICE", "cpu:1", "cuda:N"),
        ("EMBEDDING_PRECISION", "int4", "must be float32 or bfloat16 or int8"),
        ("EMBEDDING_MODEL_DIR", "models", "absolute path"),
    ],
)
def test_a_bad_value_is_named_with_its_problem(name: str, value: str, problem: str) -> None:
    with pytest.raises(InvalidSetting, match=problem) as raised:
        settings.read({name: value})
    assert str(raised.value).startswith(f"{name} must be")
    assert raised.value.sqlstate == "22023"
    assert raised.value.hint == f"Change {name} in the server's environment and restart the server."


def test_report_shows_values_and_sources_and_never_raises() -> None:
    rows = {
        name: (value, source)
        for name, value, source in settings.report({"EMBEDDING_THREADS": "x", "EMBEDDING_DEVICE": "cpu"})
    }
    assert len(rows) == len(settings.VARIABLES)
    assert rows["EMBEDDING_DEVICE"] == ("cpu", "environment")
    assert rows["EMBEDDING_BATCH_SIZE"] == ("32", "default")
    assert rows["EMBEDDING_MAX_SEQ_LENGTH"] == (None, "default")
    value, source = rows["EMBEDDING_THREADS"]
    assert value == "x"
    assert source.startswith("invalid: EMBEDDING_THREADS must be a whole number")


def test_misspelt_variables_are_found() -> None:
    assert settings.unknown({"EMBEDDING_MODEL": "x", "EMBEDDING_DEVICE": "cpu", "HOME": "/"}) == ["EMBEDDING_MODEL"]


@pytest.mark.parametrize("wanted", ["cuda:0", "CUDA:1", "cuda:12"])
def test_one_of_several_devices(wanted: str) -> None:
    assert settings.read({"EMBEDDING_DEVICE": wanted}).device == wanted.lower()


def test_names_are_read_without_regard_to_case() -> None:
    environ = {"embedding_threads": "2", "Embedding_Preload": "one"}
    environ |= {"EMBEDDING_BATCH_SIZE": "8", "embedding_batch_size": "9"}
    read = settings.read(environ)
    assert (read.threads, read.preload, read.batch_size) == (2, ("one",), 8)
    assert settings.preload_names(environ) == ("one",)
    assert settings.unknown(environ) == ["embedding_batch_size"]


def test_what_is_no_setting_is_a_row() -> None:
    rows = settings.report({"EMBEDDING_THREAD": "2", "PATH": "/bin"})
    assert rows[-1] == ("EMBEDDING_THREAD", "2", "not a setting")
    assert len(rows) == len(settings.VARIABLES) + 1
