"""The diffusion process: noising and its training targets (`schedule`), and sampling (`samplers`).

In: latents, noise and timesteps; for sampling, a `denoise` function.
Out: noisy latents, targets and loss weights for training; clean latents for generation.
Never: runs a network of its own, encodes images, or makes the result of a row depend on other rows.
"""
