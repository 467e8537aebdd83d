"""Files that earlier versions saved still load and give their numbers, and what is measured today agrees with them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from safe_trainer import AlignmentDirection, SafetyBasis, TrainedVectors

FOLDER = Path(__file__).parent / "format1"
NUMBERS = json.loads((FOLDER / "numbers.json").read_text())

_spec = importlib.util.spec_from_file_location("format1_make", FOLDER / "make.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


def assert_equal(found, kind):
    assert found.keys() == NUMBERS[kind].keys()
    for name, numbers in NUMBERS[kind].items():
        assert found[name] == pytest.approx(numbers, rel=1e-5, abs=1e-7), name


def test_a_direction_of_format_1_loads_with_its_numbers():
    assert_equal(make.of_direction(AlignmentDirection.load(FOLDER / "direction.safetensors")), "direction")


def test_a_basis_of_format_1_loads_with_its_numbers_and_fits_its_model():
    basis = SafetyBasis.load(FOLDER / "basis.safetensors")
    assert_equal(make.of_basis(basis), "basis")
    basis.check_fits(make.tiny.model(), list(basis.outputs), ("output", "input"), rank=6)


def test_vectors_of_format_1_load_with_their_numbers_and_fit_their_model():
    vectors = TrainedVectors.load(FOLDER / "vectors")
    assert_equal(make.of_vectors(vectors), "vectors")
    assert vectors.check_fits(make.speaking()).keys() == vectors.modules.keys()


def test_what_is_measured_today_agrees_with_format_1():
    assert_equal(make.of_direction(make.measured_direction()), "direction")
    assert_equal(make.of_basis(make.measured_basis()), "basis")
