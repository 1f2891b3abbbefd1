"""What trained models learned: figures of the recorded measurements, and the report."""
