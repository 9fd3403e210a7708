"""What every process shares: settings, telemetry, and the local Kafka."""
