"""No number changes: tests/golden.json, made before the code was rearranged, against today's."""
import json

import golden
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.COMMANDS)
def test_every_number_is_as_it_was(name):
    kept = json.loads((golden.ROOT / "tests/golden.json").read_text())
    if kept["machine"] != golden.machine():
        pytest.skip(f"made with {kept['machine']}; here is {golden.machine()}")
    assert golden.differences(golden.measured(name), kept[name]) == []
