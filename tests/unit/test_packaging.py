"""What packagers read: META.json by PGXN's meta spec 1.0.0, and pgxs.mk."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import autoembed

ROOT = Path(__file__).parents[2]
REQUIRED = ("name", "version", "abstract", "maintainer", "license", "provides", "meta-spec")
TERM = re.compile(r"[^\s/\\\x00-\x1f\x7f]{2,}")
SEMVER = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?")
RELATIONS = {"requires", "recommends", "suggests", "conflicts"}
PHASES = {"configure", "build", "test", "runtime", "develop"}


@pytest.fixture(scope="module")
def meta() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "META.json").read_text(encoding="utf-8"))
    return found


def test_what_pgxn_requires(meta: dict[str, Any]) -> None:
    assert all(meta[key] for key in REQUIRED)
    assert TERM.fullmatch(meta["name"])
    assert SEMVER.fullmatch(meta["version"])
    assert meta["license"] == "postgresql"  # one of the spec's own words
    assert meta["release_status"] in ("stable", "testing", "unstable")
    assert meta["meta-spec"] == {"version": "1.0.0", "url": "https://pgxn.org/meta/spec.txt"}
    assert all(isinstance(tag, str) and 0 < len(tag) < 256 and "/" not in tag for tag in meta["tags"])


def test_what_it_provides_is_there(meta: dict[str, Any]) -> None:
    ((name, provided),) = meta["provides"].items()
    assert name == meta["name"]
    assert (ROOT / provided["file"]).is_file()
    assert (ROOT / provided["docfile"]).is_file()
    control = (ROOT / f"{name}.control").read_text(encoding="utf-8")
    (version,) = re.findall(r"^default_version = '(.*)'$", control, re.MULTILINE)
    assert {meta["version"], provided["version"], version} == {autoembed.__version__}


def test_what_it_needs(meta: dict[str, Any]) -> None:
    for phase, relations in meta["prereqs"].items():
        assert phase in PHASES
        assert relations.keys() <= RELATIONS
        versions = [version for needed in relations.values() for version in needed.values()]
        assert all(version == 0 or SEMVER.fullmatch(version) for version in versions)
    control = (ROOT / "pg_autoembed.control").read_text(encoding="utf-8")
    (requires,) = re.findall(r"^requires = '(.*)'$", control, re.MULTILINE)
    assert meta["prereqs"]["runtime"]["requires"].keys() == {"PostgreSQL", *requires.split(", ")}


def test_each_regression_test_is_run_and_has_its_output() -> None:
    (listed,) = re.findall(r"^REGRESS = (.*)$", (ROOT / "pgxs.mk").read_text(encoding="utf-8"), re.MULTILINE)
    for folder, suffix in (("sql", ".sql"), ("expected", ".out")):
        files = (ROOT / "tests" / "regress" / folder).iterdir()
        assert {file.name for file in files} == {name + suffix for name in listed.split()}
