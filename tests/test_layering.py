"""The house rules that a machine can check: who imports whom, where torch is, how large a room may be.

The rules are the tables below. Each check returns sentences, one per violation, and is itself tested
on a tiny tree that breaks it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "dreamllm_jax"

# A room imports from the rooms of earlier rows and from itself. Rooms of one row do not know each other.
ORDER = (
    ("atomic", "version"),
    ("config", "batch", "document", "distributed"),
    ("sharding",),
    ("ops",),
    ("models", "diffusion"),
    ("checkpoint",),
    ("train", "convert"),
    ("generate",),
    ("parity", "aot", "evaluate"),
    ("commands",),
)
# A room beside that order, what it stands on, and the row from which it may be used.
BESIDE = "data"
BESIDE_STANDS_ON = ("atomic", "config", "batch", "document")
BESIDE_USED_FROM = "checkpoint"
# The package's front door shows a few names of these rooms; nobody inside enters by it.
FRONT_DOOR = ("document", "generate", "version")
# Besides the folder commands: every `__main__`, and every file that `python -m dreamllm_jax.X` runs.
COMMANDS = ("compile",)

OUTSIDE = ("configs", "examples", "launch", "tools", "benchmarks", "tests")
TORCH = ("torch", "torchvision", "diffusers")
TORCH_ROOMS = (f"{PACKAGE}/convert/torch_files.py", "benchmarks")
FOLDERS = (PACKAGE, "configs", "examples", "launch", "tools", "benchmarks")
FORBIDDEN_NAMES = ("utils.py", "utils")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def allowed_imports() -> dict[str, set[str]]:
    """Room -> the rooms it may import from, itself included."""
    table: dict[str, set[str]] = {"": set(FRONT_DOOR), BESIDE: {BESIDE, *BESIDE_STANDS_ON}}
    earlier: set[str] = set()
    for row in ORDER:
        if BESIDE_USED_FROM in row:
            earlier.add(BESIDE)
        for room in row:
            table[room] = earlier | {room}
        earlier |= set(row)
    return table


def room_of(module: str) -> str | None:
    """The room of a module inside the package ('models.llama' -> 'models'); None if it is in no room."""
    parts = module.split(".")
    if parts[-1] == "__main__" or module in COMMANDS:
        return "commands"
    return parts[0] if parts[0] in allowed_imports() else None


def sources(root: Path, folders: tuple[str, ...] = FOLDERS) -> Iterator[tuple[Path, ast.Module]]:
    """Every Python file below the folders, with its syntax tree."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root), ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    """'dreamllm_jax/models/llama.py' -> 'dreamllm_jax.models.llama'."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything imported, wherever in the file it stands."""
    package = (
        module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def layering_violations(root: Path) -> list[str]:
    """Imports against the order, and modules that stand in no room."""
    found, table = [], allowed_imports()
    for path, tree in sources(root, (PACKAGE,)):
        inner = module_name(path).removeprefix(PACKAGE).removeprefix(".")
        room = "" if inner == "" else room_of(inner)
        if room is None:
            found.append(f"{path}: stands in no room of the table; add it to ORDER.")
            continue
        for line, name in imports(path, tree):
            if name.split(".")[0] in OUTSIDE:
                found.append(f"{path}:{line}: imports {name}, which lies outside the package.")
            elif name.split(".")[0] == PACKAGE:
                target = room_of(name.removeprefix(PACKAGE).removeprefix(".")) or ""
                if target not in table[room]:
                    shown = target or "the package's front door"
                    found.append(f"{path}:{line}: {room or 'the front door'} may not import from {shown}.")
    return found


def torch_violations(root: Path) -> list[str]:
    """torch and its family outside their rooms (tests are not looked at: there they are welcome)."""
    return [
        f"{path}:{line}: imports {name}; PyTorch is only for tests and {', '.join(TORCH_ROOMS)}."
        for path, tree in sources(root)
        if not any(path.is_relative_to(folder) for folder in TORCH_ROOMS)
        for line, name in imports(path, tree)
        if name.split(".")[0] in TORCH
    ]


def size_violations(root: Path) -> list[str]:
    """Files and functions (docstring included) that should become two rooms; tests too."""
    found = []
    for path, tree in sources(root, (*FOLDERS, "tests")):
        lines = len((root / path).read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            found.append(f"{path}: {lines} lines; at most {MAX_FILE_LINES}.")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    found.append(
                        f"{path}:{node.lineno}: {node.name} has {length} lines; at most {MAX_FUNCTION_LINES}."
                    )
    return found


def name_violations(root: Path) -> list[str]:
    """Rooms named after nothing."""
    return [
        f"{path}: say what it is for instead of '{part}'."
        for path, _ in sources(root)
        for part in path.parts
        if part in FORBIDDEN_NAMES
    ]


def docstring_violations(root: Path) -> list[str]:
    """Modules that do not say their job."""
    return [
        f"{path}: has no module docstring." for path, tree in sources(root) if not ast.get_docstring(tree)
    ]


CHECKS = (layering_violations, torch_violations, size_violations, name_violations, docstring_violations)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_keeps_its_rules(check):
    found = check(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_there_is_a_house_to_check():
    rooms = {room_of(module_name(path).removeprefix(f"{PACKAGE}.")) for path, _ in sources(ROOT, (PACKAGE,))}
    assert rooms >= {room for row in ORDER for room in row} | {BESIDE}


LONG_FUNCTION = '"""Doc."""\n\n\ndef long():\n' + "    x = 1\n" * MAX_FUNCTION_LINES
LONG_METHOD = '"""Doc."""\n\n\nclass A:\n    def long(self):\n' + "        x = 1\n" * MAX_FUNCTION_LINES

BROKEN = (
    # check, file, content, a part of the sentence expected
    (
        layering_violations,
        "models/a.py",
        "from dreamllm_jax.train.step import f",
        "models may not import from train",
    ),
    (layering_violations, "models/a.py", "from dreamllm_jax import train", "may not import from train"),
    (layering_violations, "train/a.py", "from dreamllm_jax.convert import f", "may not import from convert"),
    (layering_violations, "convert/a.py", "from dreamllm_jax.train import f", "may not import from train"),
    (
        layering_violations,
        "aot/a.py",
        "import dreamllm_jax.train.__main__",
        "may not import from command",
    ),
    (layering_violations, "aot/a.py", "from dreamllm_jax.parity import f", "may not import from parity"),
    (layering_violations, "aot/a.py", "from dreamllm_jax.commands import f", "may not import from commands"),
    (layering_violations, "models/a.py", "import dreamllm_jax.generate.text", "may not import from generate"),
    (
        layering_violations,
        "ops/a.py",
        "from dreamllm_jax.models import llama",
        "ops may not import from models",
    ),
    (layering_violations, "sharding.py", "from .ops.linear import f", "sharding may not import from ops"),
    (layering_violations, "models/a.py", "from ..aot import scores", "may not import from aot"),
    (
        layering_violations,
        "models/a.py",
        "def f():\n    from ..data import images",
        "may not import from data",
    ),
    (
        layering_violations,
        "models/a.py",
        "from dreamllm_jax.diffusion.schedule import f",
        "may not import from diffusion",
    ),
    (layering_violations, "models/__init__.py", "from ..train import f", "models may not import from train"),
    (
        layering_violations,
        "train/a.py",
        "from dreamllm_jax.generate import f",
        "may not import from generate",
    ),
    (
        layering_violations,
        "batch.py",
        "from dreamllm_jax.config import f",
        "batch may not import from config",
    ),
    (
        layering_violations,
        "data/a.py",
        "from dreamllm_jax.sharding import f",
        "data may not import from sharding",
    ),
    (
        layering_violations,
        "sharding.py",
        "from dreamllm_jax.models import llama",
        "may not import from models",
    ),
    (layering_violations, "aot/a.py", "from dreamllm_jax import DreamLLM", "the package's front door"),
    (layering_violations, "__init__.py", "from .models.llama import Llama", "the front door may not import"),
    (layering_violations, "train/a.py", "from configs import handwriting", "outside the package"),
    (layering_violations, "train/a.py", "import tools.convert_weights", "outside the package"),
    (layering_violations, "data/a.py", "from examples.handwriting import words", "outside the package"),
    (layering_violations, "attic/a.py", "", "stands in no room"),
    (torch_violations, "models/a.py", "import torch.nn as nn", "imports torch.nn"),
    (torch_violations, "convert/pickles.py", "import torch", "imports torch"),
    (torch_violations, "models/a.py", "def f():\n    from diffusers import UNet", "imports diffusers.UNet"),
    (size_violations, "models/a.py", '"""Doc."""\n' * (MAX_FILE_LINES + 1), "lines; at most 400"),
    (size_violations, "models/a.py", LONG_FUNCTION, "long has 61 lines"),
    (size_violations, "models/a.py", LONG_METHOD, "long has 61 lines"),
    (name_violations, "models/utils.py", "", "'utils.py'"),
    (name_violations, "utils/a.py", "", "'utils'"),
    (docstring_violations, "models/a.py", "x = 1", "no module docstring"),
    (docstring_violations, "models/__init__.py", "", "no module docstring"),
)

SOUND = (
    (layering_violations, "models/a.py", "from dreamllm_jax.models.b import f\nfrom ..batch import Batch"),
    (layering_violations, "models/a.py", "from dreamllm_jax import sharding\nimport jax, flax.linen"),
    (layering_violations, "models/a.py", "from dreamllm_jax.ops.linear import Dense"),
    (
        layering_violations,
        "ops/attention/a.py",
        "from dreamllm_jax.ops import cpu\nfrom ...sharding import f",
    ),
    (layering_violations, "models/__init__.py", "from .llama import Llama"),
    (layering_violations, "train/__main__.py", "from dreamllm_jax.convert.opening import open_model"),
    (layering_violations, "compile.py", "from dreamllm_jax.commands.compile import COMMAND"),
    (
        layering_violations,
        "commands/a.py",
        "from dreamllm_jax.aot import f\nfrom dreamllm_jax.train import g",
    ),
    (layering_violations, "aot/a.py", "from dreamllm_jax.generate import f\nfrom ..data import images"),
    (layering_violations, "diffusion/sampling.py", "from dreamllm_jax.diffusion.schedule import f"),
    (layering_violations, "__init__.py", "from dreamllm_jax.document import Document"),
    (torch_violations, "convert/torch_files.py", "import torch"),
    (size_violations, "models/a.py", LONG_FUNCTION.replace("    x = 1\n", "", 1)),
)


def write(root: Path, file: str, content: str) -> None:
    path = root / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")


@pytest.mark.parametrize(("check", "file", "content", "sentence"), BROKEN)
def test_each_check_finds_what_it_is_for(tmp_path, check, file, content, sentence):
    write(tmp_path, file, content)
    found = check(tmp_path)
    assert len(found) == 1 and sentence in found[0], found


@pytest.mark.parametrize(("check", "file", "content"), SOUND)
def test_each_check_lets_the_sound_pass(tmp_path, check, file, content):
    write(tmp_path, file, content)
    assert check(tmp_path) == []


@pytest.mark.parametrize("folder", ["configs", "examples", "tools", "launch", "benchmarks"])
def test_rooms_outside_the_package_are_looked_at(tmp_path, folder):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "a.py").write_text("import torch\n", encoding="utf-8")
    assert bool(torch_violations(tmp_path)) == (folder != "benchmarks") and docstring_violations(tmp_path)
