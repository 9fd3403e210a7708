"""Nearline: the jobs between Kafka topics and the N2O index of a host, and the library that publishes events."""
