"""The packaged model."""
