"""The transfer of whole models to a vLLM server."""

import time
from pathlib import Path

from lit_rlhf.errors import UserError
from lit_rlhf.http import JSONClient

RESET_ATTEMPTS, RESET_SECONDS = 20, 0.5
"""The maximum number of requests to the server to empty its prefix cache, and the seconds between two of them."""


def push_weights(client: JSONClient, version: str, folder: Path | None) -> None:
    """Make the server read the weights in a folder, empty its prefix cache, and store the name of the weights.

    Args:
        client: The client of the server.
        version: The name of the weights, which `check_version` looks for.
        folder: The folder of the weights.

    Raises:
        UserError: if the server does not read the weights, or cannot empty its prefix cache.
    """
    client.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
    for _ in range(RESET_ATTEMPTS):  # fails as long as a request is active, such as an abandoned one
        if client.post("/reset_prefix_cache", {})["success"]:
            break
        time.sleep(RESET_SECONDS)
    else:
        raise UserError(f"{client.option}: the server cannot empty its prefix cache: another program is using it")
    client.post("/update_weight_version", {"new_version": version})


def check_version(client: JSONClient, version: str) -> None:
    """Check that the server still has the weights with the given name; after a restart, for example, it does not.

    Args:
        client: The client of the server.
        version: The name of the weights.

    Raises:
        UserError: if the server has other weights, or does not answer.
    """
    found = client.get("/weight_info")["weight_version"]
    if found != version:
        raise UserError(
            f"{client.option}: the server has the weights {found!r} instead of {version!r}: it was restarted, or "
            "another run uses it"
        )
