"""Every parameter and every pinned activation of the 7B recipe costs where it lay."""

import json

from tests.aot import goldens


def test_shardings_are_those_written_down():
    found, written = goldens.shardings(), json.loads(goldens.FILE.read_text())
    changed = {
        f"{kind} {name}: {there.get(name)} -> {found[kind].get(name)}"
        for kind, there in written.items()
        for name in there.keys() | found[kind].keys()
        if there.get(name) != found[kind].get(name)
    }
    assert not changed, "\n".join(["if this is wanted: python -m tests.aot.goldens", *sorted(changed)])
    assert len(written["parameters"]) > 900 and len(written["activations"]) > 40
