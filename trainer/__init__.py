"""Trains on what `curate pack` wrote: a compact CLIP, and the models that draw from its vectors."""
