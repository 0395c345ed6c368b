"""What is known of every family of Modular Diffusers: `python -m tools.families --help`."""
