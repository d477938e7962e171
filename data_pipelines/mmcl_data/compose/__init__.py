"""Sounds composed of single events, with captions that are true of them and captions that are not."""
