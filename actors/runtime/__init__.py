"""The actor runtime: actors, their mailboxes' loop, handlers, heartbeats.

`triptych.actors` names what others need to write an actor; `runtime` starts actors, `system_messages` inspects them.
"""
