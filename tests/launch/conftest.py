"""Stand-ins for the tools of clusters: executables on the PATH that write down what they are asked."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE = """#!{python}
import json, os, sys
with open({record!r}, "a") as file:
    file.write(json.dumps([{tool!r}, *sys.argv[1:]]) + "\\n")
{does}
"""


class Cluster:
    """A PATH of stand-ins and of the system's own folders, and what was asked of the stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.home, self.record = folder / "bin", folder / "home", folder / "asked.jsonl"
        self.root = ROOT  # whose launch/ is run
        self.bin.mkdir()
        self.home.mkdir()

    def add(self, tool: str, does: str = "") -> None:
        """A tool that does something after writing its arguments down, in Python."""
        path = self.bin / tool
        path.write_text(FAKE.format(python=sys.executable, record=str(self.record), tool=tool, does=does))
        path.chmod(0o755)

    def asked(self) -> list[list[str]]:
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [json.loads(line) for line in lines]

    def launch(self, script: str, *args: str, **variables: str) -> subprocess.CompletedProcess:
        """Runs a script of launch/ with the stand-ins first on the PATH and no other variables."""
        bash = shutil.which("bash")
        assert bash is not None
        environment = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.home), **variables}
        command = [bash, str(self.root / "launch" / script), *args]
        return subprocess.run(
            command, env=environment, cwd=self.home, capture_output=True, text=True, timeout=60
        )

    def refused(self, script: str, *args: str, **variables: str) -> str:
        """The one sentence with which a script declines; nothing may have been asked of any tool."""
        before = self.asked()
        result = self.launch(script, *args, **variables)
        lines = result.stderr.strip().splitlines()
        assert result.returncode == 1 and len(lines) == 1 and lines[0].endswith("."), result
        assert self.asked() == before
        return lines[0]


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    if os.name != "posix" or shutil.which("bash") is None:
        pytest.skip("the scripts need bash")
    return Cluster(tmp_path)
