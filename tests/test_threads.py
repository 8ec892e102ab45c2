"""How long threads spin for each other is chosen before torch is loaded, unless the user has chosen."""

import os
import subprocess
import sys

import pytest

ASK = "import {}, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
@pytest.mark.parametrize("package", ["dmd_dar", "eval"])
def test_the_number_of_spins_is_the_users_or_a_small_one(package, given, expected):
    bare = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    told = subprocess.run([sys.executable, "-c", ASK.format(package)], env=bare | given, capture_output=True, text=True)
    assert told.stdout.split() == [expected, "False"], told.stderr
