"""The version, for what writes it into files."""

VERSION = "0.1.0"
