"""What can go wrong, as a small tree: each leaf has its SQLSTATE, and its docstring is its message.

No message ever holds a row's text: messages reach users, logs and tables that others may read.
"""

import inspect


class AutoembedError(Exception):
    """pg_autoembed failed: {reason}"""

    sqlstate = "38000"
    default_hint: str | None = None

    def __init__(self, *, hint: str | None = None, **fields: object) -> None:
        super().__init__(_message(type(self), fields))
        self.hint = hint if hint is not None else self._hint(fields)

    def _hint(self, fields: dict[str, object]) -> str | None:
        return self.default_hint.format(**fields) if self.default_hint else None


def _message(kind: type[AutoembedError], fields: dict[str, object]) -> str:
    template = " ".join(inspect.cleandoc(kind.__doc__ or "").split())
    return template.format(**fields)


class ApiMismatch(AutoembedError):
    """the extension's SQL speaks version {sql} and the Python package version {package}"""

    sqlstate = "55000"
    default_hint = (
        "Install both from one release (make install), run ALTER EXTENSION pg_autoembed UPDATE, and reconnect."
    )


class InvalidSetting(AutoembedError):
    """{variable} {problem}"""

    sqlstate = "22023"
    default_hint = "Change {variable} in the server's environment and restart the server."


class InvalidOption(AutoembedError):
    """{option} {problem}"""

    sqlstate = "22023"


class DeviceUnavailable(InvalidSetting):
    """EMBEDDING_DEVICE is {device}, but torch finds no such device here"""

    default_hint = "Set EMBEDDING_DEVICE to auto or cpu, or make {device} visible to the server."


class WrongDimensions(InvalidSetting):
    """EMBEDDING_DIMENSIONS is {expected}, but model "{name}" has {actual} dimensions"""

    default_hint = "Choose another model, or change or unset EMBEDDING_DIMENSIONS."


class InvalidName(AutoembedError):
    """ "{name}" is not a model's name"""

    sqlstate = "22023"
    default_hint = (
        "A name has letters, digits, dots, hyphens and underscores; "
        "it is a folder in the model directory, never a path."
    )


class UnknownModel(AutoembedError):
    """model "{name}" is not in the model directory {directory}"""

    sqlstate = "22023"


class NoDefaultModel(UnknownModel):
    """no model was named, and the default model "{name}" is not in the model directory {directory}"""


class ModelExists(AutoembedError):
    """model "{name}" is already there with other content or options"""

    sqlstate = "42710"
    default_hint = "Use --force to replace it (columns filled with it then refuse to mix vectors), or --name."


class BrokenModel(AutoembedError):
    """model "{name}" cannot be used: {reason}"""

    sqlstate = "55000"
    default_hint = "Add it again with `autoembed model add PATH --force`."


class ChangedModel(AutoembedError):
    """model "{name}" was changed after it was added: {file} {change}"""

    sqlstate = "55000"
    default_hint = "Restore the file, or add the changed model under another name or with --force."


class UnreadableModel(AutoembedError):
    """{path} cannot be read: {reason}"""

    sqlstate = "58P01"
    default_hint = "The server's user needs to read the model directory and all folders above it."


class UnwritableDirectory(AutoembedError):
    """{path} cannot be written: {reason}"""

    sqlstate = "58030"
    default_hint = "Run this as the directory's owner (often: sudo), or name another directory with --dir."


class MissingFile(AutoembedError):
    """model "{name}" has no {file}"""

    sqlstate = "58P01"


class UnsupportedModel(AutoembedError):
    """model "{name}" is not supported: {reason}"""

    sqlstate = "0A000"


class RemoteCode(UnsupportedModel):
    """model "{name}" wants to run its own code: {reason}"""

    default_hint = "pg_autoembed never runs a model's own code in the server. Choose a model without it."


class DownloadFailed(AutoembedError):
    """model "{name}" could not be downloaded: {reason}"""

    sqlstate = "58030"


class MissingPackage(AutoembedError):
    """the Python package {package} is not installed, and {purpose} needs it"""

    sqlstate = "58P01"
    default_hint = "Run `make install`, which installs the pinned packages where the server finds them."


class OutOfMemory(AutoembedError):
    """model "{name}" ran out of memory: {reason}"""

    sqlstate = "53200"
    default_hint = "Free memory, use a smaller model, or lower EMBEDDING_MAX_SEQ_LENGTH."


class EncoderBroken(AutoembedError):
    """the encoder of model "{name}" fails even for a plain word: {reason}"""

    sqlstate = "58000"
    default_hint = "No row was blamed. Try again in a new session; `autoembed doctor` checks the installation."


class NotFilled(AutoembedError):
    """{problem}"""  # with the SQLSTATE of what the server said


class OtherModel(AutoembedError):
    """model "{name}" is not the one that the column was declared with: its files have changed"""

    sqlstate = "55000"
    default_hint = (
        "Restore its files, or call embed_column_set(..., model => '{name}'): it clears the column to fill it anew."
    )


class OtherDimensions(AutoembedError):
    """{label} is a vector({column}) now, but model "{name}" has {model} dimensions"""

    sqlstate = "55000"
    default_hint = "Give the column its type back, or call embed_column_set(..., model => ...) with a model that fits."
