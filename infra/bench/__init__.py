"""Measurements that README and decisions quote: each a script that prints its figures."""
