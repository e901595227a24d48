"""preflight.sh: every check in both ways, with a host whose parts are stand-ins."""

import http.server
import re
import shutil
import sys
import threading
import time
from email.utils import formatdate
from importlib import metadata

import pytest

from tests.launch.conftest import ROOT, Cluster

JAX = """
class Device:
    device_kind = "TPU v5p"
def local_devices(): return [Device()] * 4
def device_count(): return 64
def default_backend(): return "tpu"
"""
DF = """
print("Filesystem 1024-blocks Used Available Capacity Mounted on")
print("/dev/a", 10**9, 0, {gib} * 2**20, "0%", sys.argv[-1])
"""
BUCKET = """
import pathlib
store = pathlib.Path({store!r})
verb, name = sys.argv[2], sys.argv[-1].replace("/", "_")
if verb == {broken!r}:
    sys.exit("denied: " + verb)
elif verb == "cp":
    (store / name).write_text(open(sys.argv[3]).read())
elif verb == "cat":
    print((store / name).read_text(), end="")
else:
    (store / name).unlink()
"""
COMMON = ("--platform", "tpu", "--devices", "4", "--workdir", "/mnt/new/run", "--bucket", "gs://b/runs/")


class Host:
    """A TPU host in good order: a stand-in jax, df, chronyc and gcloud, and the pins of what is installed."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.site = cluster, cluster.home / "site"
        cluster.root = cluster.home.parent / "clone"
        self.pins = cluster.root / "launch/constraints/py{}{}.txt".format(*sys.version_info[:2])
        shutil.copytree(
            ROOT / "launch", cluster.root / "launch", ignore=shutil.ignore_patterns("__pycache__")
        )
        shutil.copy(ROOT / "pyproject.toml", cluster.root)
        self.site.mkdir()
        (self.site / "jax.py").write_text(JAX)
        self.installed("libtpu", "1.2")
        here = {one.metadata["Name"].lower(): one.version for one in metadata.distributions()}
        lines = [f"{name}=={version.split('+')[0]}" for name, version in {**here, "libtpu": "1.2"}.items()]
        self.pins.write_text("\n".join(lines))
        cluster.add("df", DF.format(gib=500))
        cluster.add("chronyc", "print('Leap status     : Normal')")
        self.bucket()

    def installed(self, name: str, version: str) -> None:
        folder = self.site / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def bucket(self, broken: str = "") -> None:
        store = self.cluster.home / "store"
        store.mkdir(exist_ok=True)
        self.cluster.add("gcloud", BUCKET.format(store=str(store), broken=broken))

    def look(self, *args: str, **variables: str) -> dict[str, tuple[str, str]]:
        """Check -> (ok, FAILED or -, sentence); the exit code is that of the sentences."""
        variables = {"PYTHON": sys.executable, "PYTHONPATH": str(self.site), **variables}
        result = self.cluster.launch("preflight.sh", *COMMON, *args, **variables)
        lines = [line.split(maxsplit=2) for line in result.stdout.splitlines()]
        assert not result.stderr and all(line[2].endswith(".") for line in lines), result
        found = {check.removesuffix(":"): (state, sentence) for state, check, sentence in lines}
        assert list(found) == ["devices", "versions", "disk", "bucket", "clock"]
        assert result.returncode == int(any(state == "FAILED" for state, _ in found.values()))
        return found

    def fails(self, check: str, *args: str, **variables: str) -> str:
        """The sentence of this check, which alone must have failed."""
        found = self.look(*args, **variables)
        assert [name for name, (state, _) in found.items() if state == "FAILED"] == [check], found
        return found[check][1]


@pytest.fixture
def host(cluster) -> Host:
    return Host(cluster)


def test_a_host_in_good_order(host):
    found = host.look()
    assert {state for state, _ in found.values()} == {"ok"}, found
    assert found["devices"][1] == "4 on this host, 64 in all (tpu, TPU v5p)."
    assert "libtpu 1.2, as pinned." in found["versions"][1]
    assert "500 GiB are free at /mnt/new/run" in found["disk"][1]
    assert not list((host.cluster.home / "store").iterdir())
    (df,) = (words for words in host.cluster.asked() if words[0] == "df")
    assert df[-1] in ("/mnt", "/")  # the workdir is not there yet


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"tpu"', '"cpu"', "JAX runs on cpu, not on tpu; launch/install.sh tpu installs"),
        ("* 4", "* 3", "JAX sees 3 on this host, not 4"),
        (
            "class",
            "raise RuntimeError('no libtpu.so')\nclass",
            "JAX does not start: RuntimeError: no libtpu.so",
        ),
        ("class", "import time; time.sleep(60)\nclass", "JAX found none within 1 s; start this on all hosts"),
    ],
)
def test_devices(host, old, new, sentence):
    (host.site / "jax.py").write_text(JAX.replace(old, new))
    assert sentence in host.fails("devices", "--timeout", "1")


def test_versions(host):
    pins = host.pins.read_text()
    host.pins.write_text(pins.replace("libtpu==1.2", "libtpu==1.3"))
    assert "libtpu is 1.2, not 1.3; launch/install.sh tpu" in host.fails("versions")
    host.pins.write_text(pins)
    project = host.cluster.root / "pyproject.toml"
    described = project.read_text()
    project.write_text(described.replace('"absl-py"', '"absl-py", "not-here>=1"'))
    assert "not-here is missing; launch/install.sh tpu" in host.fails("versions")
    project.write_text(described)
    host.pins.unlink()
    assert "has no versions" in host.fails("versions")


def test_no_python(host):
    found = host.look(PYTHON="/nowhere/python")
    assert [found[check][0] for check in found] == ["FAILED", "FAILED", "ok", "ok", "ok"]
    assert "there is no /nowhere/python; launch/install.sh tpu creates it" in found["devices"][1]


def test_disk(host):
    host.cluster.add("df", DF.format(gib=199))
    assert "199 GiB are free at /mnt/new/run, but 200 are needed" in host.fails("disk")
    assert host.look("--need", "199")["disk"][0] == "ok"
    host.cluster.add("df", "sys.exit('df: stale file handle')")
    assert "stale file handle" in host.fails("disk")


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ("cp", "gs://b/runs/ is not writable: denied: cp"),
        ("cat", "is not what was written"),
        ("rm", "cannot be deleted: denied: rm"),
    ],
)
def test_bucket(host, broken, sentence):
    host.bucket(broken)
    assert sentence in host.fails("bucket")


def test_shared_folder(host):
    shared = host.cluster.home / "shared"
    shared.mkdir()
    assert host.look("--bucket", str(shared))["bucket"][0] == "ok" and not list(shared.iterdir())
    assert "No such file" in host.fails("bucket", "--bucket", str(shared / "gone"))


def test_clock_of_the_host(host):
    host.cluster.add("chronyc", "print('Leap status     : Not synchronised')")
    assert "chrony is not synchronized" in host.fails("clock")
    host.cluster.add("chronyc", "sys.exit('506 Cannot talk to daemon')")
    assert "Cannot talk to daemon" in host.fails("clock")


@pytest.mark.parametrize(("ahead", "right"), [(0, True), (-90, False), (90, False), (None, False)])
def test_clock_of_a_server(host, ahead, right):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):  # noqa: N802
            self.send_response_only(403)  # it tells the time nevertheless
            if ahead is not None:
                self.send_header("Date", formatdate(time.time() + ahead, usegmt=True))
            self.end_headers()

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        clock = ("--clock", f"http://127.0.0.1:{server.server_port}")
        if right:
            assert host.look(*clock)["clock"][0] == "ok"
        else:
            said = host.fails("clock", *clock)
            assert re.search(
                "has no Date header" if ahead is None else f"is {'-' * (ahead > 0)}(89|90|91) s away from",
                said,
            )
        server.shutdown()


def test_dry_run_and_mistakes(host):
    result = host.cluster.launch("preflight.sh", *COMMON, "--dry-run")
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 5 and host.cluster.asked() == []
    for words, sentence in {
        "--platform gpu": "give tpu, cuda or cpu",
        "--devices four": "--devices is 'four'",
        "--need 0": "--need is '0'",
        "--bucket s3://b": "give a folder or gs://BUCKET/FOLDER",
        "--clock pool.ntp.org": "give an address",
        "--workdir": "--workdir has no value",
        "here": "here is unknown",
    }.items():
        assert sentence in host.cluster.refused("preflight.sh", *words.split())
