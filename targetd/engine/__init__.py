"""The live configuration: targets, extents and logical units as they are served."""
