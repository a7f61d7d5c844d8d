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
from autoembed.server.refusals import Answer, Misfit, Refusal, granted, interface
from autoembed.server.status_file import StatusFile


def start(plpy: Any, gd: dict[str, Any], api_version: int) -> None:
    """Puts the session into GD; or what refuses, where the extension's SQL and this package do not fit."""
    session: Session | Misfit = Session(plpy, gd)
    if api_version != API_VERSION:
        session = Misfit(plpy, ApiMismatch(sql=api_version, package=API_VERSION))
    gd[f"autoembed {api_version}"] = session


class Session:
    """The functions in Python of sql/, each under its name there."""

    def __init__(self, plpy: Any, gd: dict[str, Any]) -> None:
        self.plpy = plpy
        self.gd = gd
        self.models: LoadedModels = gd.setdefault("autoembed models", LoadedModels(gd, StatusFile(), plpy.log))
        self.database = SessionDatabase(plpy)
        self.immediate = Immediate(plpy, self.models)

    # --- embedding ---------------------------------------------------------------------------------------------

    @granted
    def encode_text(self, content: str | None, model: str | None, prompt: str | None) -> Answer:
        return Answer(vector=self.vectors([content], model, prompt)[0])

    @granted
    def encode_texts(self, contents: list[str | None] | None, model: str | None, prompt: str | None) -> Answer:
        if contents is None:
            return Answer()
        if any(isinstance(text, list) for text in contents):
            raise Refusal("the array of texts has more than one dimension", "2202E", "Pass a one-dimensional array.")
        return Answer(vectors=self.vectors(contents, model, prompt))

    def vectors(self, contents: list[str | None], model: str | None, prompt: str | None) -> list[str | None]:
        if all(text is None for text in contents):
            return contents
        return embedding.embed(self.models, model, contents, prompt, self.database.check_encoding)

    @granted
    def load_model(self, model: str | None) -> Answer:
        return Answer(name=self.models.encoder(model).model.name)

    @granted
    def unload_models(self) -> Answer:
        return Answer(count=self.models.clear())

    # --- filling -----------------------------------------------------------------------------------------------

    @granted
    def fill_pending(
        self, batch: int | None, relation: int | None, max_rows: int | None, max_seconds: int | None
    ) -> Answer:
        return self.fill_call(batch).fill_pending(relation, max_rows, max_seconds)

    @granted
    def fill_on(self, batch: int | None, max_seconds: int | None, workers: int | None) -> Answer:
        return self.fill_call(batch).stay(max_seconds, workers)

    def fill_call(self, batch: int | None) -> FillCall:
        return FillCall(self.plpy, self.database, self.models, batch)

    @granted
    def wait_for(self, relation: int | None, label: str | None, timeout: str | None, seconds: float | None) -> Answer:
        calls.wait(self.database, relation, label, timeout, seconds)
        return Answer()

    def most_new_rows(self, registration: int, label: str) -> int | None:
        return self.immediate.most_new_rows(registration, label)

    @interface
    def embed_new(
        self, relation: int, target: str, keys: list[str], contents: list[str], hashes: list[bytes]
    ) -> Answer:
        return self.immediate.embed_new(relation, target, keys, contents, hashes)

    # --- what the views show -----------------------------------------------------------------------------------

    @interface
    def find_model(self, name: str | None) -> Answer:
        found = directory.find(settings.read(), name)
        return Answer(
            name=found.name,
            dimensions=found.dimensions,
            max_tokens=found.max_tokens,
            fingerprint=found.fingerprint,
        )

    @interface
    def list_models(self) -> list[Answer]:
        return [Answer(asdict(entry)) for entry in directory.catalog(settings.read())]

    @interface
    def list_sessions(self) -> list[Answer]:
        """Returns what the sessions have loaded that the current user may look into."""
        return [Answer(entry) for entry in status_file.sessions(self.database.visible_pids())]

    @interface
    def list_settings(self) -> list[Answer]:
        rows = preloaded.annotate(self.gd, settings.report())
        return [Answer(name=name, value=value, source=source) for name, value, source in rows]

    @interface
    def list_checks(self) -> list[Answer]:
        from autoembed.server import health  # here: nobody else needs it

        checks = health.check_all(self.gd)
        return [Answer(asdict(check), check_name=name) for name, check in checks.items()]
