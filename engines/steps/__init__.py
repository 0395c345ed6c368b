"""Run denoising steps: one run alone, or several together.

`denoising` suspends a run between two steps, and `denoiser_calls` where it calls its denoiser. `executor` advances
several runs by a step each and computes their calls together: `batching` has the rules, which `probing` tries with the
model.
"""
