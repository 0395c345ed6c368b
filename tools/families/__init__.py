"""What is known of every family of Modular Diffusers: `python -m triptych.tools.families --help`."""
