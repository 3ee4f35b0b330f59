"""LightZero's UniZero configurations: `docs/make_zoo.py` tries all of them."""

import os

import lightzero_building as building
import lightzero_zoo as zoo
import pytest

from kvjax.tools.bench import lightzero_020

pytestmark = [
    pytest.mark.skipif(not lightzero_020.available(), reason="LightZero 0.2.0 is not installed"),
    pytest.mark.filterwarnings("ignore"),  # LightZero's own
]

NAMES = ["cartpole_unizero"]
if os.environ.get("KVJAX_FULL"):
    NAMES = sorted(building.files())


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration(name, tmp_path):
    row = zoo.tried(name, building.files()[name], tmp_path)
    said = (row.loads, row.searches, row.attaches, row.verifies)
    assert all(said)
    assert not [x for x in said if x.startswith(("refused", "LightZero"))]
