"""Kills, stops and confuses the actors of a running cluster under load, and checks that nothing accepted is lost."""
