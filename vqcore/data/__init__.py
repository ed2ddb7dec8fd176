"""The core's own data sources, and what makes batches of any source."""
