"""`dreamllm generate`: continues prompts with documents, images or text, and writes them to files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamllm_jax.atomic import atomic_write, write_text
from dreamllm_jax.commands.command import OK, Command
from dreamllm_jax.commands.completion import FILES, FOLDERS, completes
from dreamllm_jax.config.registry import known_names

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from dreamllm_jax.document import Document
    from dreamllm_jax.generate.api import DreamLLM

# What is generated -> the suffixes of the file that it is written to.
SUFFIXES = {"document": (".html",), "images": (".png",), "text": (".txt",)}
# The settings of the model's generation_config that each kind of result has, as keyword arguments.
TEXT = ("max_new_tokens", "temperature", "top_p")
DRAWING = (
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "guidance_rescale",
    "sampler",
    "eta",
)
SETTINGS = {
    "document": (*TEXT, *DRAWING, "max_images"),
    "images": (*DRAWING, "num_images_per_prompt"),
    "text": TEXT,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    completes(add("model", metavar="MODEL", help="a model's folder, or its id on the hub"), FOLDERS)
    add("prompts", metavar="PROMPT", nargs="+", help="several are generated together")
    completes(
        add(
            "--image",
            type=Path,
            action="append",
            default=[],
            metavar="FILE",
            dest="images",
            help="show this image before each prompt; may be repeated",
        ),
        FILES,
    )
    kinds = parser.add_mutually_exclusive_group()
    for kind, words in (
        ("document", "generate text with images, written to --out as HTML"),
        ("images", "generate images, written to --out as PNG"),
        ("text", "generate text, printed, and written to --out if that is given"),
    ):
        kinds.add_argument(f"--{kind}", action="store_const", const=kind, dest="kind", help=words)
    completes(
        add(
            "--out",
            type=Path,
            metavar="FILE",
            help=".html, .png or .txt, which also chooses what is generated; several results are numbered: "
            "FILE-0.png, FILE-1.png",
        ),
        FILES,
    )
    add("--seed", type=int, default=0, help="prompt i gets SEED + i (default: 0)")
    add("--dtype", choices=("float32", "bfloat16"), help="of weights and computation (default: the model's)")
    add(
        "--quantize",
        choices=("int8",),
        help="round the language model's weights: half the memory of bfloat16",
    )
    add("--mesh", metavar="AXIS=N,...", help="shard the model over the devices, e.g. fsdp=4,tensor=2")
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings (default: those saved with the model)")
    for name, kind, words in (
        ("max_new_tokens", int, "tokens of text, at most"),
        ("temperature", float, "sampling temperature of text; 0 always takes the most probable token"),
        ("top_p", float, "nucleus sampling: share of the probability that is sampled from"),
        ("max_images", int, "images in a document, at most"),
        ("num_images_per_prompt", int, "images of each prompt, with --images"),
        ("sampler", str, f"{', '.join(known_names('sampler'))}, or package.module:function"),
        ("num_inference_steps", int, "denoising steps"),
        ("guidance_scale", float, "strength of classifier-free guidance; 1 turns it off"),
        ("guidance_rescale", float, "share of the guided prediction that is rescaled (arXiv 2305.08891)"),
        ("eta", float, "noise added by the sampler ddim"),
        ("negative_prompt", str, "guide away from this text"),
    ):
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, help=words)


def run(options: argparse.Namespace) -> int:
    kind = _kind(options)
    settings = _settings(options, kind)
    from dreamllm_jax import distributed
    from dreamllm_jax.generate.api import DreamLLM

    distributed.initialize()
    prompts = _prompts(options)
    model = DreamLLM.from_pretrained(
        options.model, options.dtype, _mesh(options.mesh), quantize=options.quantize
    )
    results = _generate(model, kind, prompts, settings)
    if distributed.is_main():
        for line in _write(results, options.out):
            print(line)
    distributed.barrier("written")
    return OK


def _kind(options: argparse.Namespace) -> str:
    """Returns what to generate: by the flag, or else by the suffix of --out, or else text.

    Raises:
      ValueError: --out does not fit what is generated, or is missing.
    """
    suffix = None if options.out is None else options.out.suffix.lower()
    by_suffix = {s: kind for kind, suffixes in SUFFIXES.items() for s in suffixes}
    if suffix is not None and suffix not in by_suffix:
        raise ValueError(f"--out={options.out}: give a file that ends in {', '.join(by_suffix)}.")
    kind = options.kind or (by_suffix[suffix] if suffix else "text")
    if suffix is None and kind != "text":
        raise ValueError(f"--{kind} needs --out, a file that ends in {' or '.join(SUFFIXES[kind])}.")
    if suffix is not None and by_suffix[suffix] != kind:
        raise ValueError(f"--{kind} is written as {' or '.join(SUFFIXES[kind])}, but --out is {options.out}.")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise ValueError(f"--out={options.out}: its folder does not exist; make it first.")
    return kind


def _settings(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Returns the settings that were given, and the seed.

    Raises:
      ValueError: a setting that this kind of result does not have.
    """
    every = {name for names in SETTINGS.values() for name in names}
    given = {name: value for name in sorted(every) if (value := getattr(options, name)) is not None}
    if unused := [f"--{name.replace('_', '-')}" for name in given if name not in SETTINGS[kind]]:
        raise ValueError(f"{', '.join(unused)} has no effect on --{kind}; leave it out.")
    return {**given, "seed": options.seed}


def _prompts(options: argparse.Namespace) -> list[Document]:
    from PIL import Image, UnidentifiedImageError

    from dreamllm_jax.document import Document

    pictures = []
    for path in options.images:
        try:
            pictures.append(Image.open(path).convert("RGB"))
        except UnidentifiedImageError as error:
            raise ValueError(f"--image={path} is not an image that Pillow can read.") from error
        except FileNotFoundError as error:
            raise ValueError(f"--image={path}: the file does not exist.") from error
    return [Document([*pictures, prompt]) for prompt in options.prompts]


def _mesh(text: str | None) -> Mesh | None:
    """Returns the mesh of `--mesh fsdp=4,tensor=2`; None for the default device."""
    if text is None:
        return None
    from dreamllm_jax.config.base import build
    from dreamllm_jax.config.train import MeshConfig
    from dreamllm_jax.sharding import make_mesh

    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not size.lstrip("-").isdecimal():
            raise ValueError(f"--mesh={text}: {part!r} is not AXIS=N; write, for example, fsdp=4,tensor=2.")
        sizes[axis] = int(size)
    return make_mesh(build(MeshConfig, {"fsdp": 1, **sizes}, "mesh"))


def _generate(model: DreamLLM, kind: str, prompts: list[Document], settings: dict[str, Any]) -> list[Any]:
    """Returns strings, images or documents, in the prompts' order."""
    if kind == "text":
        return model.generate_text(prompts, **settings)
    if kind == "images":
        return [picture for pictures in model.generate_images(prompts, **settings) for picture in pictures]
    return model.generate_document(prompts, **settings)


def _write(results: list[Any], out: Path | None) -> list[str]:
    """Writes the results; returns the lines to print: texts themselves, and the names of written files."""
    if out is None:
        return results
    lines = []
    for i, result in enumerate(results):
        path = out if len(results) == 1 else out.with_name(f"{out.stem}-{i}{out.suffix}")
        if isinstance(result, str):
            write_text(path, f"{result}\n")
            lines.append(result)
        elif hasattr(result, "save_html"):
            result.save_html(path)
        else:
            with atomic_write(path) as beside:
                result.save(beside, format="PNG")
        lines.append(f"wrote {path}")
    return lines


COMMAND = Command(
    name="generate",
    summary="continue prompts with documents, images or text",
    description="Continues each PROMPT with a document, with images or with text. Without --document,\n"
    "--images and --text the suffix of --out decides; without --out, text is printed.",
    examples=(
        'stages/3_stage3/model "Write three plus four." --out sum.html',
        'stages/3_stage3/model "Draw a seven." --out seven.png --num-images-per-prompt 4 --seed 1',
        'models/dreamllm-7b "What is in this image?" --image cat.jpg --max-new-tokens 64',
        'models/dreamllm-7b "A recipe for pancakes." --out recipe.html --dtype bfloat16 --mesh fsdp=4',
    ),
    add_arguments=add_arguments,
    run=run,
)
