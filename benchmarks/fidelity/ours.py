"""`python -m benchmarks.fidelity.ours CASE FOLDER`: our numbers beside those that `theirs` wrote.

Prints one JSON object: `output.`, `gradient.` and `bfloat16.` with their errors (see `cases.BOUNDS`).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from benchmarks.fidelity.cases import CASES, numbers
from dreamllm_jax.batch import Batch
from dreamllm_jax.checkpoint.parameter_files import to_device
from dreamllm_jax.convert.recognize import open_checkpoint
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.parity.errors import relative_distance, scaled_error

Arrays = dict[str, np.ndarray]
PICTURES = ("pixels", "latents", "unet", "moments", "decoded")


def here(name: str, value: np.ndarray) -> np.ndarray:
    """PyTorch's layout as ours: pictures get their channels last."""
    return np.moveaxis(value, 1, -1) if name in PICTURES else value


def llama(module: DreamLLMModule, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Logits of one row of embeddings."""
    length = x["embeds"].shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    hidden = module.llama(x["embeds"], positions, jnp.ones((1, length), jnp.int32))
    return {"logits": module.llama.logits(hidden)}


def clip(module: DreamLLMModule, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """States and embeddings of both towers."""
    states, pooled = module.text(x["tokens"].astype(jnp.int32))
    head = module.contrastive
    return {
        "features": module.vision(x["pixels"], select_layer=-2),
        "vision": head.visual_projection(module.vision.pooled(x["pixels"])),
        "states": states,
        "text": head.text_projection(pooled),
    }


def llava(module: DreamLLMModule, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Logits of one row with a picture in the place of its image tokens."""
    tokens = x["tokens"].astype(jnp.int32)
    here = tokens == 31999
    none, ones = jnp.full_like(tokens, -1), jnp.ones_like(tokens)
    batch = Batch(
        tokens=tokens,
        targets=none,
        segment_ids=ones,
        positions=jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape),
        loss_weights=jnp.zeros(tokens.shape, jnp.float32),
        image_slots=jnp.where(here, jnp.cumsum(here, axis=1, dtype=jnp.int32) - 1, -1),
        dream_slots=none,
        image_mask=jnp.ones((1, 1), bool),
        dream_mask=jnp.zeros((1, 1), bool),
        null_dream=jnp.full((1,), -1, jnp.int32),
        images=x["pixels"][:, None],
    )
    return {"logits": module.logits(module.read(batch))}


def unet(module: DreamLLMModule, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The U-Net's prediction, the VAE's moments and a decoded picture."""
    added = {name: x[name] for name in ("text_embeds", "time_ids") if name in x} or None
    steps = jnp.asarray([500], jnp.int32)
    return {
        "unet": module.unet(x["latents"], steps, x["context"], added),
        "moments": module.vae.encode(x["pixels"]),
        "decoded": module.vae.decode(x["latents"]),
    }


KINDS: dict[str, Callable] = {"llama": llama, "clip": clip, "llava": llava, "unet": unet}


def compute(case_name: str, folder: Path, inputs: Arrays, pulled: str, dtype: str) -> tuple[Arrays, Arrays]:
    """(outputs, gradients of sum(pulled output * fixed numbers))."""
    source = open_checkpoint(folder / "source")
    tensors, report = source.params()
    report.raise_if_faulty(case_name)
    alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = unflatten_dict({path: to_device(t, alone, dtype) for path, t in tensors.items()}, sep="/")
    module = DreamLLMModule(dataclasses.replace(source.model, dtype=dtype))
    run = KINDS[CASES[case_name].kind]
    pull = [name for name, value in inputs.items() if np.issubdtype(value.dtype, np.floating)]

    def outputs(params, floats, rest):
        found = module.apply({"params": params}, {**floats, **rest}, method=run)
        weights = jnp.asarray(here(pulled, numbers(*shape_of(found[pulled], pulled), seed=99)))
        return (found[pulled].astype(jnp.float32) * weights).sum(), found

    given = {name: jnp.asarray(here(name, value)) for name, value in inputs.items()}
    floats = {name: given[name].astype(dtype) for name in pull}
    rest = {name: value for name, value in given.items() if name not in pull}
    (_, found), grads = jax.jit(jax.value_and_grad(outputs, argnums=1, has_aux=True))(params, floats, rest)
    return jax.device_get(found), jax.device_get(grads)


def shape_of(value: jax.Array, name: str) -> tuple[int, ...]:
    """The shape that PyTorch gives this output."""
    return (
        tuple(np.moveaxis(np.empty(value.shape, np.bool_), -1, 1).shape) if name in PICTURES else value.shape
    )


def main() -> None:
    """Prints the errors of a case."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    reference = dict(np.load(folder / "reference.npz"))
    kinds: dict[str, Arrays] = {}
    for key, value in reference.items():
        kind, _, inner = key.partition(".")
        kinds.setdefault(kind, {})[inner] = value
    pulled = {"llama": "logits", "clip": "features", "llava": "logits", "unet": "unet"}[CASES[name].kind]
    found, grads = compute(name, folder, kinds["in"], pulled, "float32")
    errors = {f"output.{n}": scaled_error(found[n], here(n, v)) for n, v in kinds["output"].items()}
    errors |= {f"gradient.{n}": relative_distance(grads[n], here(n, v)) for n, v in kinds["gradient"].items()}
    half, half_grads = compute(name, folder, kinds["in"], pulled, "bfloat16")
    for key, theirs in kinds["bfloat16"].items():
        n = key.removeprefix("gradient of ")
        exact, ours = (kinds["output"][n], half[n]) if n == key else (kinds["gradient"][n], half_grads[n])
        errors[f"bfloat16.{key}"] = relative_distance(ours, here(n, exact)) / relative_distance(theirs, exact)
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
