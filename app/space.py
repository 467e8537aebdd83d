"""Starts the app as a Hugging Face Space; `make space` adds it to the packages `app` and `safe_trainer`."""

import os
from pathlib import Path

import uvicorn

from app.server import GRACE, create_app
from app.setup import space_setup


def kept_in(storage: Path) -> Path | None:
    """Return where runs are kept, to each visitor its own, if storage is mounted; nowhere otherwise."""
    return storage / "safe_trainer" if storage.is_mount() else None


if __name__ == "__main__":
    # A Space is reached through a proxy, from everywhere: no password, but nobody sees another's files.
    server = create_app(space_setup(), folder=kept_in(Path("/data")), hosts=None, alone=True)
    port = int(os.environ.get("PORT", "7860"))
    uvicorn.run(server, host="0.0.0.0", port=port, log_level="warning", timeout_graceful_shutdown=GRACE)
