"""Names of a recipe: short ones, importable ones, and those of installed packages."""

import sys

import pytest

from dreamllm_jax.config import registry
from dreamllm_jax.config.registry import KINDS, Kind, check_name, known_names, resolve


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's module `their_code` that Python finds."""
    (tmp_path / "their_code.py").write_text(
        "class Group:\n    value = 3\n\n\ndef heun():\n    return 'heun'\n"
    )
    (tmp_path / "their_broken_code.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("their_code", "their_broken_code"):
        sys.modules.pop(name, None)


def install(folder, package, lines, group="dreamllm_jax.samplers"):
    """What an installer leaves of a package with entry points."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{line}\n" for line in lines))


@pytest.fixture
def euler(monkeypatch):
    """One built-in sampler, wherever the real ones are."""
    kinds = {**KINDS, "sampler": Kind("dreamllm_jax.samplers", {"euler": "math:sqrt"})}
    monkeypatch.setattr(registry, "KINDS", kinds)


def test_an_importable_name(project):
    assert resolve("sampler", "their_code:heun")() == "heun"
    assert resolve("sampler", "their_code:Group.value") == 3


def test_a_built_in_name_means_the_same_whatever_is_installed(project, euler):
    import math

    install(project, "theirs", ["euler = their_code:heun"])
    assert resolve("sampler", "euler") is math.sqrt


def test_an_installed_package_registers_by_entry_point(project, euler):
    install(project, "theirs", ["heun = their_code:heun"])
    assert resolve("sampler", "heun")() == "heun"
    assert known_names("sampler") == ["euler", "heun"]
    with pytest.raises(ValueError, match="Unknown optimizer 'heun'"):
        resolve("optimizer", "heun")


def test_a_name_that_two_packages_claim(project):
    install(project, "theirs", ["heun = their_code:heun"])
    install(project, "others", ["heun = their_code:Group"])
    with pytest.raises(ValueError, match="several installed packages; write one of their_code:Group, their_"):
        resolve("sampler", "heun")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("eulr", "Unknown sampler 'eulr'; known: euler; for one of your own, write package.module:attr"),
        ("a b:c", "'a b:c' is not an importable name; write package.module:attribute, for example my_"),
        ("their_code:", "is not an importable name"),
        (":heun", "is not an importable name"),
    ],
)
def test_a_wrong_name_is_one_sentence(project, euler, name, sentence):
    for function in (resolve, check_name):
        with pytest.raises(ValueError, match=sentence):
            function("sampler", name)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("their_code:hun", "'their_code:hun': the module 'their_code' has no 'hun'; correct the name"),
        ("no_such_module:f", r"cannot be imported \(ModuleNotFoundError: No module named 'no_such_module'\)"),
        ("their_broken_code:f", r"\(ModuleNotFoundError: No module named 'no_such_package_at_all'\)"),
    ],
)
def test_a_failed_import_says_why(project, name, sentence):
    check_name("sampler", name)  # imports nothing
    with pytest.raises(ValueError, match=sentence):
        resolve("sampler", name)


def test_a_kind_without_names_says_what_to_write():
    with pytest.raises(ValueError, match="Unknown corpus 'x'; none is built in, write package.module:attri"):
        resolve("corpus", "x")


def test_the_public_functions_of_a_module_are_built_in(project, monkeypatch):
    """Their names are read from the source: nothing is imported until one is resolved."""
    (project / "their_samplers.py").write_text(
        "import their_code\n\n\ndef heun():\n    return their_code.heun()\n\n\ndef _helper():\n    pass\n"
    )
    kinds = {**KINDS, "sampler": Kind("dreamllm_jax.samplers", module="their_samplers")}
    monkeypatch.setattr(registry, "KINDS", kinds)
    assert known_names("sampler") == ["heun"]
    check_name("sampler", "heun")
    assert "their_samplers" not in sys.modules
    assert resolve("sampler", "heun")() == "heun"
    del sys.modules["their_samplers"]


def test_every_built_in_name_can_be_imported():
    for kind in KINDS:
        for name in known_names(kind):
            assert callable(resolve(kind, name))
