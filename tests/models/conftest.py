"""Fixtures for the tests of the U-Net and the VAE: random weights, and diffusers' weights for Flax."""

import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest


def convert(state):
    """Returns a diffusers state dict (or its gradients) as Flax parameters, transformer blocks stacked."""
    flat, stacks = {}, {}
    for name, tensor in state.items():
        array = tensor.detach().cpu().numpy()
        # Copy, because torch reuses the memory of parameters and gradients.
        array = np.array(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T)
        name = re.sub(r"\.(\d+)", r"_\1", name)
        *path, last = name.split(".")
        if last == "weight":
            last = "scale" if array.ndim == 1 else "kernel"
        block = next((p for p in path if p.startswith("transformer_blocks_")), None)
        if block is None:
            flat[(*path, last)] = jnp.asarray(array)
        else:
            path[path.index(block)] = "transformer_blocks"
            stacks.setdefault((*path, last), {})[int(block.rsplit("_", 1)[1])] = array
    flat |= {path: jnp.stack([rows[i] for i in sorted(rows)]) for path, rows in stacks.items()}
    return {"params": flax.traverse_util.unflatten_dict(flat)}


@pytest.fixture(scope="session")
def from_diffusers():
    return convert


@pytest.fixture(scope="session")
def randomize():
    """Replaces all weights of a torch module by random ones, such that every bias and norm matters."""

    def replace_weights(module):
        import torch

        generator = torch.Generator().manual_seed(0)
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.data = noise / parameter[0].numel() ** 0.5
            else:
                parameter.data = 0.2 * noise + ("norm" in name and name.endswith("weight"))
        return module.eval()

    return replace_weights


@pytest.fixture(scope="session")
def draw_params():
    """Returns random parameters for a module, such that every bias and norm matters, without its `init`."""

    def draw(module, *inputs):
        rng = np.random.default_rng(0)

        def leaf(path, like):
            noise = rng.normal(size=like.shape)
            fan_in = like.size / like.shape[-1] if path[-1].key == "kernel" else 25
            return jnp.asarray(noise / fan_in**0.5 + (path[-1].key == "scale"), like.dtype)

        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
        return jax.tree_util.tree_map_with_path(leaf, shapes)

    return draw
