"""`python -m benchmarks.fidelity.ours CASE FOLDER`: compares our results with those that `theirs` recorded.

Prints one JSON object with the errors `output.*`, `gradient.*` and `bfloat16.*` (see `cases.BOUNDS`).
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

from benchmarks.fidelity.cases import CASES, random_normal
from dreamllm_jax.batch import Batch
from dreamllm_jax.checkpoint.parameter_files import to_device
from dreamllm_jax.convert.recognize import open_checkpoint
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.parity.errors import relative_distance, scaled_error

Arrays = dict[str, np.ndarray]
# The arrays that PyTorch has as [B, C, h, w].
CHANNELS_FIRST = ("pixels", "latents", "unet", "moments", "decoded")


def from_torch_layout(name: str, value: np.ndarray) -> np.ndarray:
    """Converts an array from PyTorch's layout to ours: the channels of images and latents become last."""
    return np.moveaxis(value, 1, -1) if name in CHANNELS_FIRST else value


def llama(module: DreamLLMModule, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the logits of one row of embeddings."""
    length = x["embeds"].shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    hidden = module.llama(x["embeds"], positions, jnp.ones((1, length), jnp.int32))
    return {"logits": module.llama.logits(hidden)}


def clip(module: DreamLLMModule, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the hidden states and embeddings of both towers."""
    states, pooled = module.text(x["tokens"].astype(jnp.int32))
    head = module.contrastive
    return {
        "features": module.vision(x["pixels"], select_layer=-2),
        "vision": head.visual_projection(module.vision.pooled(x["pixels"])),
        "states": states,
        "text": head.text_projection(pooled),
    }


def llava(module: DreamLLMModule, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the logits of one row whose image tokens are replaced by an image."""
    tokens = x["tokens"].astype(jnp.int32)
    is_image = tokens == 31999
    unused, ones = jnp.full_like(tokens, -1), jnp.ones_like(tokens)
    batch = Batch(
        tokens=tokens,
        targets=unused,
        segment_ids=ones,
        positions=jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape),
        loss_weights=jnp.zeros(tokens.shape, jnp.float32),
        image_slots=jnp.where(is_image, jnp.cumsum(is_image, axis=1, dtype=jnp.int32) - 1, -1),
        dream_slots=unused,
        image_mask=jnp.ones((1, 1), bool),
        dream_mask=jnp.zeros((1, 1), bool),
        null_dream=jnp.full((1,), -1, jnp.int32),
        images=x["pixels"][:, None],
    )
    return {"logits": module.logits(module.read(batch))}


def unet(module: DreamLLMModule, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the U-Net's prediction, the VAE's moments and a decoded image."""
    added = {name: x[name] for name in ("text_embeds", "time_ids") if name in x} or None
    steps = jnp.asarray([500], jnp.int32)
    return {
        "unet": module.unet(x["latents"], steps, x["context"], added),
        "moments": module.vae.encode(x["pixels"]),
        "decoded": module.vae.decode(x["latents"]),
    }


KINDS: dict[str, Callable] = {"llama": llama, "clip": clip, "llava": llava, "unet": unet}


def compute(case_name: str, folder: Path, inputs: Arrays, output: str, dtype: str) -> tuple[Arrays, Arrays]:
    """Returns all outputs, and the float inputs' gradients of sum(`output` * fixed weights)."""
    source = open_checkpoint(folder / "source")
    tensors, report = source.params()
    report.raise_if_faulty(case_name)
    on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = unflatten_dict({path: to_device(t, on_device, dtype) for path, t in tensors.items()}, sep="/")
    module = DreamLLMModule(dataclasses.replace(source.model, dtype=dtype))
    run = KINDS[CASES[case_name].kind]
    float_names = [name for name, value in inputs.items() if np.issubdtype(value.dtype, np.floating)]

    def outputs(params, floats, rest):
        found = module.apply({"params": params}, {**floats, **rest}, method=run)
        weights = random_normal(*torch_shape(found[output], output), seed=99)
        weights = jnp.asarray(from_torch_layout(output, weights))
        return (found[output].astype(jnp.float32) * weights).sum(), found

    given = {name: jnp.asarray(from_torch_layout(name, value)) for name, value in inputs.items()}
    floats = {name: given[name].astype(dtype) for name in float_names}
    rest = {name: value for name, value in given.items() if name not in float_names}
    (_, found), grads = jax.jit(jax.value_and_grad(outputs, argnums=1, has_aux=True))(params, floats, rest)
    return jax.device_get(found), jax.device_get(grads)


def torch_shape(value: jax.Array, name: str) -> tuple[int, ...]:
    """Returns the shape of an output in PyTorch's layout."""
    if name not in CHANNELS_FIRST:
        return value.shape
    batch, height, width, channels = value.shape
    return (batch, channels, height, width)


def main() -> None:
    """Prints the errors of the case that the command line names."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    reference = dict(np.load(folder / "reference.npz"))
    kinds: dict[str, Arrays] = {}
    for key, value in reference.items():
        kind, _, inner = key.partition(".")
        kinds.setdefault(kind, {})[inner] = value
    output = {"llama": "logits", "clip": "features", "llava": "logits", "unet": "unet"}[CASES[name].kind]
    found, grads = compute(name, folder, kinds["in"], output, "float32")
    errors = {
        f"output.{n}": scaled_error(found[n], from_torch_layout(n, v)) for n, v in kinds["output"].items()
    }
    errors |= {
        f"gradient.{n}": relative_distance(grads[n], from_torch_layout(n, v))
        for n, v in kinds["gradient"].items()
    }
    found_bfloat16, grads_bfloat16 = compute(name, folder, kinds["in"], output, "bfloat16")
    for key, theirs in kinds["bfloat16"].items():
        n = key.removeprefix("gradient of ")
        is_output = n == key
        exact = kinds["output" if is_output else "gradient"][n]
        ours = (found_bfloat16 if is_output else grads_bfloat16)[n]
        our_error = relative_distance(ours, from_torch_layout(n, exact))
        errors[f"bfloat16.{key}"] = our_error / relative_distance(theirs, exact)
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
