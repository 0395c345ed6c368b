"""The buffer pool and its client."""
