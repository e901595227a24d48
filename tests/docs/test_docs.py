"""The handbook: its links lead somewhere, its marked code runs, its site builds, its glossary is complete."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dreamllm_jax.config.registry import KINDS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*DOCS.glob("*.md"), *ROOT.glob("*.md"), ROOT / "launch" / "README.md", *ROOT.glob("examples/**/*.md")]
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# A code block that is run by the test has this comment on the line before it.
RUN = re.compile(r"<!-- run -->\n```python\n(.*?)```", re.DOTALL)
BLOCKS = [(page, i, code) for page in PAGES for i, code in enumerate(RUN.findall(page.read_text("utf-8")))]


def anchors(page: Path) -> set[str]:
    """The anchors that a forge gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken_links(page: Path) -> list[str]:
    found = []
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in LINK.findall(text):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page if not name else (page.parent / name).resolve()
        if not file.exists() or (anchor and anchor not in anchors(file)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    assert not broken_links(page)


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title\n[here](#a-title) [gone](gone.md) [nothing](#none) [web](https://x.org)\n")
    assert broken_links(page) == ["gone.md", "#none"]


@pytest.mark.parametrize(("page", "number", "code"), BLOCKS, ids=[f"{p.stem}-{i}" for p, i, _ in BLOCKS])
def test_marked_code_runs(page, number, code, tmp_path, monkeypatch):
    """A block that is wrong raises an error; one that defines nothing shows nothing."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "block"}
    exec(compile(code, f"{page.name}, block {number}", "exec"), names)
    assert names.keys() - {"__name__", "__builtins__"}


def test_there_is_marked_code():
    assert len(BLOCKS) >= 3


def test_every_page_is_in_the_site():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    listed = re.findall(r"([\w-]+\.md)", str(settings["nav"]))
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


PATH = re.compile(r"`((?:dreamllm_jax|configs|launch|tests|tools|benchmarks|docs|examples)/[\w./-]*\w/?)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    """Names in capitals, such as TOWER.py, stand for a file of the reader's own."""
    named = {path for path in PATH.findall(page.read_text("utf-8")) if not re.search(r"[A-Z]{4,}\.", path)}
    assert not {path for path in named if not (ROOT / path).exists()}


def test_every_kind_of_code_from_outside_is_explained():
    table = (DOCS / "extending.md").read_text("utf-8")
    assert set(re.findall(r"`(dreamllm_jax\.\w+)` \|", table)) == {kind.group for kind in KINDS.values()}


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "batch" / "index.html").is_file()


def test_the_glossary_is_sorted_and_its_terms_are_unique():
    lines = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", (DOCS / "glossary.md").read_text("utf-8"), re.MULTILINE)
    terms = [term.strip() for term, _ in lines[1:]]
    assert len(terms) > 60
    assert terms == sorted(terms, key=str.lower) and len(set(terms)) == len(terms)


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 100
    assert any(line.startswith("![") for line in lines[:30]), "the first screen has an image"
