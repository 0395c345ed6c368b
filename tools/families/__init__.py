"""Survey how every pipeline of diffusers is served: `python -m triptych.tools.families --help`."""
