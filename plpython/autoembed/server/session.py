"""The one module that meets PostgreSQL: it receives `plpy` and `GD`, and nothing else does.

`start` puts a `Session` into GD; the PL/Python bodies in sql/ call its methods. Models stand in GD, once per session.
Nothing about who may do what is kept here: GD survives SET ROLE.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from autoembed import API_VERSION, settings
from autoembed.errors import ApiMismatch
from autoembed.models import directory
from autoembed.server import calls, embedding, preloaded, status_file
from autoembed.server.calls import FillCall
from autoembed.server.database import SessionDatabase
from autoembed.server.immediate import Immediate
from autoembed.server.loaded_models import LoadedModels
from autoembed.server.refusals import Refusal, interface
from autoembed.server.status_file import StatusFile


def start(plpy: Any, gd: dict[str, Any], api_version: int) -> None:
    """Puts the session into GD; refuses where the extension's SQL and this package do not fit."""
    if api_version != API_VERSION:
        error = ApiMismatch(sql=api_version, package=API_VERSION)
        plpy.error(str(error), sqlstate=error.sqlstate, hint=error.hint)
    gd[f"autoembed {api_version}"] = Session(plpy, gd)


class Session:
    """The functions of the interface, as the PL/Python bodies call them."""

    def __init__(self, plpy: Any, gd: dict[str, Any]) -> None:
        self.plpy = plpy
        self.gd = gd
        self.models: LoadedModels = gd.setdefault("autoembed models", LoadedModels(gd, StatusFile(), plpy.log))
        self.database = SessionDatabase(plpy)
        self.immediate = Immediate(plpy, self.database, self.models)

    # --- embedding ---------------------------------------------------------------------------------------------

    @interface
    def embed_one(self, content: str | None, model: str | None, prompt: str | None) -> str | None:
        return self.vectors([content], model, prompt)[0]

    @interface
    def embed_many(
        self, contents: list[str | None] | None, model: str | None, prompt: str | None
    ) -> list[str | None] | None:
        if contents is None:
            return None
        if any(isinstance(text, list) for text in contents):
            raise Refusal("the array of texts has more than one dimension", "2202E", "Pass a one-dimensional array.")
        return self.vectors(contents, model, prompt)

    def vectors(self, contents: list[str | None], model: str | None, prompt: str | None) -> list[str | None]:
        if all(text is None for text in contents):
            return contents
        return embedding.embed(self.models, model, contents, prompt, self.database.check_encoding)

    @interface
    def embed_load(self, model: str | None) -> str:
        return self.models.encoder(model).model.name

    @interface
    def embed_unload(self) -> int:
        return self.models.clear()

    # --- filling -----------------------------------------------------------------------------------------------

    @interface
    def embed_pending(
        self, batch: int | None, relation: str | None, max_rows: int | None, max_seconds: int | None
    ) -> dict[str, int]:
        return self.fill_call(batch).fill_pending(relation, max_rows, max_seconds)

    @interface
    def embed_worker(self, batch: int | None, max_seconds: int | None, workers: int | None) -> dict[str, int]:
        return self.fill_call(batch).stay(max_seconds, workers)

    def fill_call(self, batch: int | None) -> FillCall:
        return FillCall(self.plpy, self.database, self.models, batch)

    @interface
    def embed_wait(self, relation: str | None, timeout: str | None) -> None:
        calls.wait(self.database, relation, timeout)

    @interface
    def embed_rows(self, relation: int, target: str) -> None:
        self.immediate.embed_rows(relation, target)

    # --- what the views show -----------------------------------------------------------------------------------

    @interface
    def model(self, name: str | None) -> dict[str, Any]:
        found = directory.find(settings.read(), name)
        return {
            "name": found.name,
            "dimensions": found.dimensions,
            "max_tokens": found.max_tokens,
            "fingerprint": found.fingerprint,
        }

    @interface
    def list_models(self) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in directory.catalog(settings.read())]

    @interface
    def list_sessions(self) -> list[dict[str, Any]]:
        """Returns what the sessions have loaded that the current user may look into."""
        visible = {row["pid"] for row in self.database.execute("select autoembed.visible_pids() as pid")}
        return status_file.sessions(visible)

    @interface
    def health(self) -> list[tuple[str, str, str, str | None]]:
        from autoembed.server import health  # here: nobody else needs it

        checks = health.check_all(self.gd)
        return [(name, check.status, check.message, check.hint) for name, check in checks.items()]

    def list_settings(self) -> list[tuple[str, str | None, str]]:
        return preloaded.annotate(self.gd, settings.report())
