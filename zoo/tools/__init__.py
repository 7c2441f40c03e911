"""What the scripts train.py and sample.py are made of."""
