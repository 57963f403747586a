"""The packed set: what goes into which shard and split, its card, its manifest of checksums."""
