"""The demo: whose rows it learns from and how its end is drawn."""
