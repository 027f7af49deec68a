"""Thin adapters, each in the idiom of the framework it serves."""
