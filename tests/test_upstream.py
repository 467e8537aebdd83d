"""The plugin that runs TRL's own tests on our trainer: proven on a small checkout that looks like TRL's."""

from types import SimpleNamespace

import pytest
import upstream
from processes import PROCESSES, python

FAKE = """
from trl import SFTConfig, SFTTrainer

from .testing_utils import TrlTestCase

WHEN_COLLECTED = SFTTrainer.__module__


class TestSFTTrainer(TrlTestCase):
    def test_trl_was_imported_and_ours_is_run(self):
        assert WHEN_COLLECTED == "trl.trainer.sft_trainer"
        assert SFTTrainer.__module__ == "safe_trainer.trainer"

    def test_its_settings_are_untouched(self):
        assert SFTConfig.__module__ == "trl.trainer.sft_config"
"""


@pytest.mark.slow
def test_our_trainer_stands_in_the_collected_module(tmp_path):
    (tmp_path / "tests").mkdir()  # a package named as our own folder of tests is
    (tmp_path / "tests" / "__init__.py").touch()
    (tmp_path / "tests" / "testing_utils.py").write_text("class TrlTestCase:\n    pass\n")
    (tmp_path / "tests" / "test_sft_trainer.py").write_text(FAKE)

    command = ["-m", "pytest", "-p", "upstream", "tests/test_sft_trainer.py"]  # as the plugin's docstring says
    process = PROCESSES.Process(target=python, args=(command, tmp_path / "log", tmp_path))
    process.start()
    process.join(240)

    told = (tmp_path / "log").read_text()
    assert process.exitcode == 0 and "2 passed" in told, told
    assert "SafeSFTTrainer stands in for tests.test_sft_trainer.SFTTrainer" in told


def test_a_run_in_which_nothing_was_replaced_fails(request):
    with pytest.raises(pytest.UsageError, match="nothing to put our trainer in"):
        upstream.pytest_collection_modifyitems(SimpleNamespace(stash={}), [request.node])
