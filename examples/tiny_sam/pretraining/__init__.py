"""How the small SAM was made: what `pretrain.py` trains, on what, and how well it does."""
