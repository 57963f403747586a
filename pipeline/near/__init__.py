"""Near-duplicates: who is near whom, by perceptual hash and embedding, and which of them stays."""
