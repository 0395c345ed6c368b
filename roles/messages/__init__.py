"""What the actors of the serving system say to each other, one module per conversation."""
