"""The parameters of a request: what a model takes, its defaults and ranges, and validation. Imports no torch.

`schema` has the types, `declarations` derives parameters from a pipeline, `serving_config` reads defaults and ranges,
`validation` checks values, `media` says what a pipeline makes.
"""
