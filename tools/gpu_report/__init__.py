"""What Triptych gives on a GPU, in one command of nine minutes: `python -m triptych.tools.gpu_report --device cuda`.

Each row runs in a process of its own, in order of worth, and its results are written as they come: a row that crashes,
hangs or runs out of memory costs its own results from there on and nothing else.
"""
