"""From files and the command line to a checked config. omegaconf lives here alone."""
