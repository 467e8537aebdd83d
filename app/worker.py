"""A job's own process: `python -m app.worker FOLDER` carries out the job that lies in FOLDER.

What a job needs of memory goes with its process, and a process can be stopped whatever it is doing.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from . import texts
from .protocol import JOB, Cancelled, Events, Stop

logger = logging.getLogger(__name__)


def main(folder: Path) -> None:
    """Carry out a job."""
    os.chdir(folder)
    logging.basicConfig(level=logging.INFO)
    warnings.filterwarnings("ignore")
    events, stop = Events(folder), Stop(folder)
    try:
        events.tell("phase", phase="starting")
        job = json.loads((folder / JOB).read_text(encoding="utf-8"))
        if job["kind"] == "scan":
            from .running import scan

            scan(job, events)
        else:
            _train(job, events, stop)
        stop.check()
        events.tell("done")
    except (Cancelled, KeyboardInterrupt):
        events.tell("cancelled")
    except Exception as error:  # which the server tells the user
        logger.exception("The job has failed.")
        events.tell("failed", message=told(error, folder))
    sys.stdout.flush()
    os._exit(0)  # threads of libraries may not hold up the next job


def _train(job: dict[str, Any], events: Events, stop: Stop) -> None:
    """Train every variant; one that fails leaves the others as they are."""
    from . import running

    running.quiet()
    finished: dict[str, str] = {}
    for variant in job["variants"]:
        key = variant["key"]
        events.tell("variant", variant=key, state="running")
        try:
            running.train(key, events, stop)
        except (Cancelled, KeyboardInterrupt):
            raise
        except Exception as error:
            logger.exception("`%s` has failed.", key)
            stop.check()
            events.tell("variant", variant=key, state="failed", message=told(error, Path.cwd()))
        else:
            events.tell("variant", variant=key, state="done")
            finished[variant["title"]] = key
    if not finished:
        raise ValueError(texts.NOTHING_FINISHED)
    running.examine(finished, events)


def told(error: Exception, folder: Path) -> str:
    """Return what a user should know of an error: messages made for people, without the folders of this machine."""
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return texts.OUT_OF_MEMORY
    if isinstance(error, ValueError | OSError | FloatingPointError):
        return str(error).replace(f"{folder}{os.sep}", "").replace(str(folder), "")[:2000]
    return texts.UNEXPECTED.format(name=type(error).__name__)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
