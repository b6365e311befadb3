"""The attack in a process of its own, which holds the thief's belongings and a way to query, and nothing else."""
