"""Scripts that print the figures quoted in README and decisions.md."""
