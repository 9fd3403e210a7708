"""A local Apache Kafka node without prerequisites, and the topics of DESIGN.md section 4."""
