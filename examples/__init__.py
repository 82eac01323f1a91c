"""Worked examples of what the broker is for; each is a package that runs on its own."""
