"""Decide how a pipeline is cut into stages, and whether its files can be served so.

`strategy` chooses a partition. `blocks` cuts modular pipelines; `introspection` and `source_analysis` find out where a
classic pipeline can be cut. `tasks` says what requests to a class are for, `compatibility` checks a model's files.
"""
