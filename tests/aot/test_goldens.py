"""The 7B recipe's parameters and constrained activations are sharded as recorded."""

import json

from tests.aot import goldens


def test_shardings_are_those_recorded():
    found, written = goldens.shardings(), json.loads(goldens.FILE.read_text())
    changed = {
        f"{kind} {name}: {specs.get(name)} -> {found[kind].get(name)}"
        for kind, specs in written.items()
        for name in specs.keys() | found[kind].keys()
        if specs.get(name) != found[kind].get(name)
    }
    assert not changed, "\n".join(["if this is intended, run python -m tests.aot.goldens", *sorted(changed)])
    assert len(written["parameters"]) > 900 and len(written["activations"]) > 40
