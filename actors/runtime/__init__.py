"""The actor runtime: actors, their mailboxes' loop, handlers, heartbeats."""
