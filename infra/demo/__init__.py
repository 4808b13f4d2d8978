"""The demo, its rows and its picture."""
