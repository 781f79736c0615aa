"""Doors from other libraries to the runtime; each module imports its library only when it is used."""
