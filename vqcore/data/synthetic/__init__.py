"""The data source `synthetic`: seeded scenes whose labels are known exactly, because they are computed."""
