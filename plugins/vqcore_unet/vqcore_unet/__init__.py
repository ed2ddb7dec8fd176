"""Diffusion and flow: schedulers, denoisers, and the convolutional pair of VQGAN."""
