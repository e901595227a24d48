"""The diffusion process: noising and its targets (`schedule`), and the way back (`sampling`)."""
