"""`dreamllm`: help, version, completion, exit codes; the ways to start it; how fast it starts."""

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dreamllm_jax
from dreamllm_jax import distributed
from dreamllm_jax.aot.program import EFFORTS, GENERATION
from dreamllm_jax.commands import command as commands
from dreamllm_jax.commands import compile
from dreamllm_jax.commands.command import ACCELERATORS, Command, CommandGroup, Failed, exit_code, make_parser
from dreamllm_jax.commands.main import DREAMLLM, main, parser

ROOT = Path(__file__).resolve().parents[2]


def every_command(group=DREAMLLM, prog="dreamllm"):
    """(command, the words that start it), groups included."""
    yield group, prog
    for one in group.commands if isinstance(group, CommandGroup) else ():
        yield from every_command(one, f"{prog} {one.name}")


ALL = tuple(every_command())
SINGLE = tuple((one, prog) for one, prog in ALL if isinstance(one, Command))


@pytest.mark.parametrize("prog", [prog for _, prog in ALL])
def test_help_says_how_and_ends_well(prog, capsys):
    with pytest.raises(SystemExit) as end:
        main([*prog.split()[1:], "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and f"usage: {prog} " in text
    assert all(re.search(rf"^ +{code} ", text, re.M) for code in (0, 1, 2, 130, 143))


def test_a_machine_without_accelerators_uses_its_cpu(tmp_path, monkeypatch):
    """And a machine with one, or a user who has chosen, is left alone."""
    shown = tmp_path / "nvidia0"
    monkeypatch.setattr(commands, "ACCELERATORS", (str(tmp_path / "nvidia*"),))
    monkeypatch.setattr(commands.sys, "platform", "linux")
    for given, device, expected in (("", False, "cpu"), ("tpu", False, "tpu"), ("", True, "")):
        shown.touch() if device else shown.unlink(missing_ok=True)
        monkeypatch.setenv("JAX_PLATFORMS", given)
        commands.expect_accelerators()
        assert commands.os.environ["JAX_PLATFORMS"] == expected
    script = (ROOT / "launch" / "python.sh").read_text()
    assert ACCELERATORS == tuple(re.search(r"for device in (/dev/.*); do", script).group(1).split())


@pytest.mark.parametrize(("command", "prog"), SINGLE, ids=[prog for _, prog in SINGLE])
def test_examples_can_be_parsed(command, prog, capsys):
    """Every example of --help is a line that the command takes, recipes' overrides included."""
    assert command.examples
    for example in command.examples:
        options, others = parser().parse_known_args([*prog.split()[1:], *shlex.split(example)])
        assert options.command is command
        assert all(word.startswith("--config.") for word in others) and (command.overrides or not others)
    with pytest.raises(SystemExit):
        main([*prog.split()[1:], "--help"])
    text = capsys.readouterr().out
    assert all(f"  {prog} {example}" in text for example in command.examples)


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["compile", "--help"], ["convert", "to-jax", "-h"]]
)
def test_help_and_version_start_without_jax(words):
    code = (
        "import sys\nfrom dreamllm_jax.commands.main import main\ntry: main(sys.argv[1:])\n"
        "except SystemExit: pass\nheavy = {'jax', 'numpy', 'flax', 'torch', 'transformers', 'matplotlib'}\n"
        "print('imported:', *sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "imported:", done


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert re.fullmatch(
        rf"dreamllm {re.escape(dreamllm_jax.__version__)} \(JAX [\d.]+, Python [\d.]+\)\n",
        capsys.readouterr().out,
    )


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_scripts_know_the_commands(shell, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert end.value.code == 0
    assert all(word in script for word in ("generate", "to-torch", "--workdir", "--topology"))


def test_the_bash_script_completes(tmp_path, capsys):
    """bash itself, with the script loaded, completes a command and a file."""
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    (tmp_path / "dreamllm.bash").write_text(capsys.readouterr().out)
    (tmp_path / "recipe.py").touch()
    asked = (
        "source dreamllm.bash; COMP_WORDS=({words}); COMP_CWORD={last}; _shtab_dreamllm;"
        'printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    for words, expected in (("dreamllm tra", "train"), ("dreamllm train --config rec", "recipe.py")):
        line = asked.format(words=words, last=len(words.split()) - 1)
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert expected in done.stdout.split(), done


def test_choices_that_help_must_not_import():
    assert compile.PROGRAMS == ("train", *GENERATION) and compile.EFFORTS == tuple(EFFORTS)


def test_unknown_arguments_are_refused_by_name(capsys):
    for words in (["inspect", "x", "--config.seed=1"], ["convert", "to-torch", "a", "b", "--fast"], ["fly"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert words[-1] in said and "usage: dreamllm" in said
    with pytest.raises(SystemExit):
        main(["inspect", "x", "--no"])
    assert "usage: dreamllm inspect" in capsys.readouterr().err  # of the command, not of all


def run_with(error: BaseException | None) -> int:
    """The exit code of a command that raises an error, or of one that ends with 7."""

    def run() -> int:
        if error is not None:
            raise error
        return 7

    return exit_code(run)


def test_exit_codes(capsys):
    assert run_with(None) == 7
    for error, code in ((ValueError("x is 3."), 2), (OSError("disk full"), 1), (Failed("too big"), 1)):
        assert run_with(error) == code
        assert capsys.readouterr().err == f"error: {error}\n"
    assert run_with(KeyboardInterrupt()) == 130 and capsys.readouterr().err == "interrupted\n"
    assert run_with(distributed.Preempted("saved")) == 128 + signal.SIGTERM == 143
    assert capsys.readouterr().out == "saved\n"
    with pytest.raises(ZeroDivisionError):  # a defect: its traceback is what is needed
        run_with(ZeroDivisionError())


def test_overrides_reach_the_command_as_they_are():
    seen = []
    command = Command(
        "test",
        "",
        "",
        (),
        lambda p: None,
        lambda options: seen.append(options.overrides) or 0,
        overrides=True,
    )
    given = ["--config.seed=1", "--config.stages.a.data.length=-1", "--config.name=two words", "stray"]
    assert commands.run_command(make_parser(command, "test"), given) == 0 and seen == [given]


@pytest.mark.parametrize(
    ("start", "prog"),
    [
        (["-m", "dreamllm_jax"], "dreamllm"),
        (["-m", "dreamllm_jax.train"], "python -m dreamllm_jax.train"),
        (["-m", "dreamllm_jax.compile"], "python -m dreamllm_jax.compile"),
        (["-m", "dreamllm_jax.parity"], "python -m dreamllm_jax.parity"),
        (["tools/convert_weights.py"], "python tools/convert_weights.py"),
    ],
)
def test_every_way_to_start(start, prog):
    done = subprocess.run([sys.executable, *start, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {prog} "), done
    done = subprocess.run([sys.executable, *start, "--nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done


def test_no_option_hides_an_override():
    """argparse takes abbreviations: no option may be one that a --config.KEY could be short for."""
    for command, prog in SINGLE:
        if command.overrides:
            one = make_parser(command, prog)
            names = [name for action in one._actions for name in action.option_strings]
            assert "--config" in names
            assert not [name for name in names if name.startswith("--config") and name != "--config"]
