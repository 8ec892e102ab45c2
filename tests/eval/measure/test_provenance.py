"""The contract changes with every constant that a number of a report depends on."""

import pytest

from dmd_dar import spectrum
from eval.measure import one_set as measured
from eval.measure import provenance
from eval.measure import suite as distances
from eval.metrics import (
    classifier,
    features,
    frechet,
    neighbours,
    sliced,
    structure,
    verdict,
)
from eval.metrics import (
    intervals as stats,
)
from eval.metrics import (
    power_map as maps,
)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (spectrum, "OFFSETS"),
        (spectrum, "LEAST_PERIODS"),
        (spectrum, "PERIODS"),
        (spectrum, "BAND_EDGES"),
        (spectrum, "POWER_FLOOR"),
        (measured, "SLICED_IMAGES"),
        (measured, "DIVERSITY_IMAGES"),
        (classifier, "LEAST_SHARE"),
        (distances, "KID_SUBSET"),
        (distances, "KID_SUBSET_OFFLINE"),
        (neighbours, "KID_SUBSETS"),
        (sliced, "PATCHES"),
        (sliced, "BINOMIAL"),
        (features, "PCA_COMPONENTS"),
        (features, "PCA_SIDE"),
        (frechet, "LEAST_SPREAD"),
        (structure, "LEAST_KURTOSIS"),
        (maps, "PEAK_DB"),
        (structure, "FLAT_SHARE"),
        (stats, "LEAST_IN_STRATUM"),
        (verdict, "GAIN_MARGIN_DB"),
    ],
)
def test_another_constant_is_another_contract(monkeypatch, module, name):
    before = provenance.contract_hash()
    assert provenance.contract_hash() == before
    value = getattr(module, name)
    monkeypatch.setattr(module, name, value[::-1] + (1,) if isinstance(value, tuple) else value + 1)
    assert provenance.contract_hash() != before


def test_a_commit_can_be_named_where_there_is_no_checkout(monkeypatch):
    monkeypatch.setattr(provenance, "git_state", lambda: None)
    assert provenance.code_state() == {"commit": "unknown", "dirty": None}
    monkeypatch.setenv(provenance.COMMIT, "0123456789ab")
    assert provenance.code_state() == {"commit": "0123456789ab", "dirty": None}
    monkeypatch.setattr(provenance, "git_state", lambda: "a copy's old history-dirty")
    assert provenance.code_state() == {"commit": "0123456789ab", "dirty": None}
