"""Weights: files and formats, loading, quantization, offload, adapters, inspection before loading."""
