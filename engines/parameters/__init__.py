"""A request's values: what a model takes, the defaults and ranges of its serving config, and their validation."""
