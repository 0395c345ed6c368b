"""Run denoising steps: one run alone, or several together.

`denoising` suspends a run between two steps, and `denoiser_calls` where it calls its denoiser; `executor` advances
several runs by a step each.
"""
