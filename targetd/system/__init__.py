"""What the process needs of its host: threads, logs, TLS files, readiness notices."""
