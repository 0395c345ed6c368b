"""Run denoising steps: one run alone, or several together.

`denoising` suspends a run between two steps; `executor` advances several runs by a step each.
"""
