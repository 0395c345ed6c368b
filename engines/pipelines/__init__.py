"""What runs a stage of a diffusers pipeline: modular blocks, classic pipelines, one denoising step at a time."""
