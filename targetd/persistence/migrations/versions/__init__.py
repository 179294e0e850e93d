"""One file a version; ``revision`` and ``down_revision`` chain them."""
