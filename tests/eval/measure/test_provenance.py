"""The contract changes with every constant that a number of a report depends on."""

import re
from pathlib import Path

import pytest

from dmd_dar import colour as colours
from dmd_dar import spectrum
from eval.measure import one_set, provenance, suite
from eval.measure.results import CodeState
from eval.metrics import (
    classifier,
    colour,
    features,
    frechet,
    intervals,
    neighbours,
    power_map,
    sliced,
    structure,
    verdict,
)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (spectrum, "OFFSETS"),
        (spectrum, "LEAST_PERIODS"),
        (spectrum, "PERIODS"),
        (spectrum, "BAND_EDGES"),
        (spectrum, "POWER_FLOOR"),
        (one_set, "SLICED_IMAGES"),
        (one_set, "DIVERSITY_IMAGES"),
        (classifier, "LEAST_SHARE"),
        (suite, "KID_SUBSET"),
        (suite, "KID_SUBSET_OFFLINE"),
        (neighbours, "KID_SUBSETS"),
        (sliced, "PATCHES"),
        (sliced, "BINOMIAL"),
        (features, "PCA_COMPONENTS"),
        (features, "PCA_SIDE"),
        (frechet, "LEAST_SPREAD"),
        (structure, "LEAST_KURTOSIS"),
        (power_map, "PEAK_DB"),
        (structure, "FLAT_SHARE"),
        (intervals, "LEAST_IN_STRATUM"),
        (verdict, "GAIN_MARGIN_DB"),
        (colours, "BLOCK"),
        (colours, "SATURATION_FLOOR"),
        (colour, "DRIFT_CHROMA"),
        (colour, "SATURATION_RANGE"),
        (colour, "SPECKLE_DB"),
    ],
)
def test_another_constant_is_another_contract(monkeypatch, module, name):
    before = provenance.contract_hash()
    assert provenance.contract_hash() == before
    value = getattr(module, name)
    monkeypatch.setattr(module, name, value[::-1] + (1,) if isinstance(value, tuple) else value + 1)
    assert provenance.contract_hash() != before


def test_a_copy_within_another_repository_has_no_commit_of_its_own(monkeypatch):
    state = provenance.git_state()
    assert state is None or re.match(r"[0-9a-f]{12}|.*-g[0-9a-f]{12}", state)
    monkeypatch.setattr(provenance, "ROOT", Path(__file__).parent)
    assert provenance.git_state() is None


def test_a_commit_can_be_named_where_there_is_no_checkout(monkeypatch):
    monkeypatch.setattr(provenance, "git_state", lambda: None)
    assert provenance.code_now() == CodeState("unknown", None)
    monkeypatch.setenv(provenance.COMMIT, "0123456789ab")
    assert provenance.code_now() == CodeState("0123456789ab", None)
    monkeypatch.setattr(provenance, "git_state", lambda: "a copy's old history-dirty")
    assert provenance.code_now() == CodeState("0123456789ab", None)
