"""What outlives the process: the configuration store and its migrations."""
