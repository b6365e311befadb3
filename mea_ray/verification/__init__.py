"""The proof of ownership: rates with their uncertainty, and the verdict."""
