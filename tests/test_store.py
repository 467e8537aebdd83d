"""Files of ours: what was saved comes back, damage is refused, and a failed save leaves the old file alone."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from safe_trainer.artifacts.store import load_artifact, save_artifact

TENSORS = {
    "weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(3.25, dtype=torch.float64),
    "transposed": torch.arange(6).reshape(2, 3).T,
    "empty": torch.zeros(0, 4, dtype=torch.float16),
}


@pytest.fixture
def saved(tmp_path):
    return save_artifact(tmp_path / "a.safetensors", "basis", 1, TENSORS.items(), {"seed": 0, "note": "ü"})


def same(loaded, expected):
    return loaded.keys() == expected.keys() and all(
        torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in expected.items()
    )


def test_tensors_and_details_come_back_as_they_were_saved(saved):
    tensors, details = load_artifact(saved, "basis", 1)
    assert same(tensors, TENSORS)
    assert details == {"seed": 0, "note": "ü"}


def test_file_is_ordinary_safetensors_for_the_library_itself(saved):
    assert same(load_file(saved), TENSORS)
    with safe_open(saved, framework="pt") as file:
        assert file.metadata()["kind"] == "basis" and file.metadata()["format_version"] == "1"


def test_save_leaves_no_other_file_behind_and_makes_missing_folders(tmp_path):
    save_artifact(tmp_path / "new" / "folder" / "a.safetensors", "basis", 1, TENSORS.items(), {})
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.safetensors"]


def test_details_may_be_filled_while_the_tensors_are_computed(tmp_path):
    details = {}

    def computed():
        yield "a", torch.zeros(2)
        details["found"] = 7

    assert load_artifact(save_artifact(tmp_path / "a", "basis", 1, computed(), details), "basis", 1).details == {
        "found": 7
    }


def test_failure_while_computing_keeps_the_old_file_and_its_own_message(saved):
    def failing():
        yield "a", torch.zeros(2)
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="^the source is gone$"):
        save_artifact(saved, "basis", 1, failing(), {})
    assert same(load_artifact(saved, "basis", 1).tensors, TENSORS)
    assert [path.name for path in saved.parent.iterdir()] == ["a.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [4096, 299_900])
def test_full_disk_keeps_the_old_file_intact_and_says_so(saved, limit):
    # The kernel refuses to let any file grow beyond the limit, as it refuses when the disk is full.
    script = f"""
        import resource, torch
        from safe_trainer.artifacts.store import save_artifact
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        save_artifact({str(saved)!r}, "basis", 1, [("a", torch.zeros(299_800 // 4))], {{}})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"Could not save `{saved}`" in done.stderr and "as it was before" in done.stderr
    assert same(load_artifact(saved, "basis", 1).tensors, TENSORS)
    assert [path.name for path in saved.parent.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("parent", ["file", "/proc"])  # permissions mean nothing to root: folders that cannot be
def test_place_that_cannot_be_written_is_named(tmp_path, parent):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="Could not save .*Nothing was written"):
        save_artifact(tmp_path / parent / "a.safetensors", "basis", 1, TENSORS.items(), {})


def test_missing_file_and_folder_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_artifact(tmp_path / "nothing", "basis", 1)
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        load_artifact(tmp_path, "basis", 1)


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_file_cut_short_is_refused(saved, kept):
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_artifact(saved, "basis", 1)


def test_any_flipped_bit_in_the_layout_is_refused_or_harmless(saved):
    whole = saved.read_bytes()
    for position in range(8 + int.from_bytes(whole[:8], "little")):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        saved.write_bytes(damaged)
        try:
            tensors, details = load_artifact(saved, "basis", 1)
        except ValueError as error:
            assert str(saved) in str(error)
        else:  # the flip fell on a name, a number of the details, or on padding
            assert len(tensors) == len(TENSORS) and isinstance(details, dict)


def test_other_kinds_and_versions_are_refused_with_what_was_found(saved, tmp_path):
    with pytest.raises(ValueError, match="must hold: alignment direction. Found: basis"):
        load_artifact(saved, "alignment direction", 1)
    with pytest.raises(ValueError, match="has format version 1, and this version of safe_trainer reads 2"):
        load_artifact(saved, "basis", 2)
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not written by safe_trainer"):
        load_artifact(tmp_path / "model.safetensors", "basis", 1)
    (tmp_path / "notes.txt").write_text("This is a text, longer than a header's length.")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_artifact(tmp_path / "notes.txt", "basis", 1)


def test_damaged_details_are_refused(saved):
    saved.write_bytes(saved.read_bytes().replace(b'{\\"seed', b'!\\"seed'))
    with pytest.raises(ValueError, match="details of the basis"):
        load_artifact(saved, "basis", 1)
