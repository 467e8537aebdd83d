"""What holds for every test: no network, one thread, quiet libraries.

The settings are made before anything imports torch or the hub client, which read them once, at import.
"""

import functools
import importlib.metadata
import logging
import os
import signal
import sys
import tempfile

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The models of the tests are tiny: threads only get in each other's way, above all between parallel test processes.
os.environ["OMP_NUM_THREADS"] = "1"
# All Gradio apps of a process keep uploads in one folder, and other processes have theirs.
UPLOADS = tempfile.TemporaryDirectory(prefix="safe_trainer_tests_")
os.environ["GRADIO_TEMP_DIR"] = UPLOADS.name
# Where DeepSpeed is installed, accelerate imports it, and it says on standard output which accelerator it has found.
os.environ["DS_ACCELERATOR"] = "cpu"

# accelerate asks several times in each step which packages there are, and a package's metadata is parsed each time:
# about a tenth of a short training.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)

# A shell's background job ignores Ctrl-C, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Those that wait for a browser first, beside one that keeps a process busy, and then by what they take.
LONGEST = (
    "test_app_in_browser.py",
    "test_testbed_pair.py",
    "test_notebooks.py",
    "test_distributed.py",
    "test_distributed_resuming.py",
    "test_distributed_monitors.py",
    "test_app_runs.py",
    "test_crash.py",
    "test_stopping.py",
    "test_recommendation.py",
    "test_remedies.py",
    "test_readme.py",
    "test_recipe.py",
    "test_salora.py",
    "test_security_vectors.py",
    "test_trained_vectors.py",
    "test_trainer.py",
    "test_demo.py",
    "test_app_jobs.py",
    "test_app_space.py",
    "test_adding_a_method.py",
)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    """Mark what is exhaustive as slow too, and begin with the files that take minutes.

    Begun last, these would keep one process while the others have ended.
    """
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker("slow")
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


@pytest.fixture(autouse=True)
def levels_of_logging():
    """Give back what runs take from loggers, such as a study's in its worker process."""
    names = ("safe_trainer", "trl", "accelerate", "bitsandbytes", "torchao", "torch.utils._pytree")
    levels = {name: logging.getLogger(name).level for name in names}
    theirs = sys.modules.get("transformers.utils.logging")
    verbosity = theirs and theirs.get_verbosity()
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    if theirs:
        theirs.set_verbosity(verbosity)
