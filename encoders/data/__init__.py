"""Data sets: readers of published formats and the synthetic marketplace, all giving one `Dataset`."""
