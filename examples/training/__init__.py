"""What `train_multitask.py` leans on: its options, its output directory, checkpoints, and how it ends."""
