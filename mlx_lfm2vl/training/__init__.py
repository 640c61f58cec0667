"""Fine-tuning: data, the run, metrics."""
