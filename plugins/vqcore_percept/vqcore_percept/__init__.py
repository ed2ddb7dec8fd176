"""Networks that judge reconstructions: perceptual losses, teachers, discriminators, the adversary of a GAN."""
