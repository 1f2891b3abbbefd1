"""The mixers that a configuration can name, one card a mixer."""
