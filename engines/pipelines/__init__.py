"""Run the stages of a diffusers pipeline, one denoising step at a time.

`pipeline.StagePipeline` is what a process loads and calls. `modular`, `classic` and `monolithic` are the runners of the
three partitions; `engines.steps` pauses a denoise after each step.
"""
