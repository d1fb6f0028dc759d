"""What callers own: states, snapshots, caches and plans, and how a record is laid out."""
