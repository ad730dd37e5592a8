"""What is drawn and summed up of a run's tables: G-effects, scores, sweeps. It reads files, and measures nothing."""
