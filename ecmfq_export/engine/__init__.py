"""Engines: building them, reading them back, running them; and what this machine has for that."""
