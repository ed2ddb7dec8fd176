"""Reads files and the command line into a checked config. Only this folder imports omegaconf."""
