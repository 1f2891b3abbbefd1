"""The mixers that a configuration can name: one card a mixer, and the registry that lists them."""
