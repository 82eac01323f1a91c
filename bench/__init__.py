"""Benchmarks: the floor and the broker in one run, as ratios."""
