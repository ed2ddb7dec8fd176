"""The data sources of the core, and the code that makes batches from any data source."""
