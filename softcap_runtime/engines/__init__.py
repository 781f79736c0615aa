"""Engines: each is one way to compute attention on one kind of device. ``choose`` says which one serves a problem."""
