"""One experiment: its checks, its steps, its proof, and what follows the theft."""
