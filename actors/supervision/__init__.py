"""Supervision: child processes, restarts, the zygote, ownership of a state folder."""
