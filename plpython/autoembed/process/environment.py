"""The one bootstrap of the libraries behind an encoder: offline, silent, and without threads of their own."""

import os

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DEACTIVATE_ASYNC_LOAD": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # of other packages' devices, which EMBEDDING_DEVICE cannot name
    # Threads that wait for each other by spinning take the cores from the server's other backends, and from one
    # another where several encode.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}


def set_environment() -> None:
    os.environ.update(ENVIRONMENT)


def set_up_libraries() -> None:
    """Comes before the import of transformers or sentence_transformers: both read the environment only then."""
    set_environment()
    import tqdm

    tqdm.tqdm.monitor_interval = 0  # else the first progress bar, even a disabled one, starts a thread
    import huggingface_hub.constants
    from transformers.utils import logging

    # `model pull` has imported the hub's client online before.
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    logging.set_verbosity_error()
    logging.disable_progress_bar()
