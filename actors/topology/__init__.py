"""The TOML topology: its sections, parser, checks and overrides."""
