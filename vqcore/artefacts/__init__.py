"""Saved things: folders with weights, config and provenance; the hub; files of other systems."""
