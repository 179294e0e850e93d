"""The daemon's start and end: options, composition of all parts, signals, reload."""
