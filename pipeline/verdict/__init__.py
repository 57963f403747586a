"""What `filter` and `dedup` decide by and leave: aligned signals, rules, reasons."""
