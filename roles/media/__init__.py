"""Media: output formats, writers, artifacts, uploads."""
