"""The logical unit controller: istgt's line protocol (TCP 3261)."""
