"""Starts the app as a Hugging Face Space; `make space` adds it to the packages `app` and `safe_trainer`."""

import os
from pathlib import Path

import uvicorn

from app.server import GRACE, create_app
from app.setup import space_setup

STORAGE = Path("/data")

if __name__ == "__main__":
    # A Space is reached through a proxy, from everywhere: no password, but nobody sees another's files.
    # Where storage is mounted, runs are kept: to each visitor its own.
    kept = STORAGE / "safe_trainer" if STORAGE.is_mount() else None
    server = create_app(space_setup(), folder=kept, hosts=None)
    port = int(os.environ.get("PORT", "7860"))
    uvicorn.run(server, host="0.0.0.0", port=port, log_level="warning", timeout_graceful_shutdown=GRACE)  # noqa: S104
