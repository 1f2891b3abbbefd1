"""Speed and memory, measured beside the baselines and the machine's roofs in one run."""
