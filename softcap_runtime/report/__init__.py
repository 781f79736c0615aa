"""What ``stats``, ``inspect`` and the metrics show."""
