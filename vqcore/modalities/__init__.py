"""The core's own modalities: how a sample is read, cropped, resized, normalised and shown."""
