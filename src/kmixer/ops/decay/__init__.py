"""Decayed linear attention: the recurrence that defines it, and its faster forms."""
