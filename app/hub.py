"""Pushing an adapter to the Hub, with the user's own login."""

from __future__ import annotations

import logging
from pathlib import Path

from . import texts
from .catalogue import hub_model

logger = logging.getLogger(__name__)

_KEPT_BACK = ["training_args.bin", "checkpoint-*", "*.log"]


def push(folder: Path, repository: str, token: str | None = None) -> str:
    """Push an adapter as a private repository and return what to tell the user.

    Args:
        folder (`Path`): The adapter's.
        repository (`str`): Its name there, as owner/name.
        token (`str`, *optional*): The user's; left out, this machine's login. It is passed on and never shown.

    Raises:
        ValueError: If it cannot be pushed; the message is for the user and holds nothing secret.
    """
    from huggingface_hub import HfApi, get_token

    name = hub_model(repository.strip()).path
    token = token or get_token()
    if not token:
        raise ValueError(texts.PUSH_LOGIN)
    try:
        api = HfApi(token=token)
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=_KEPT_BACK)
    except Exception as error:  # whatever the network or the Hub makes of it; their texts may hold addresses and keys
        logger.info("Pushing failed: %s", type(error).__name__)
        raise ValueError(texts.PUSH_FAILED.format(name=type(error).__name__)) from None
    return texts.PUSH_DONE.format(repo=name)
