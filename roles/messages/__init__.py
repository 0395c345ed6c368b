"""The messages between the actors of the serving system, one module per protocol."""
