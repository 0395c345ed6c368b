"""A role process: instance, stream worker and transfer actor."""
