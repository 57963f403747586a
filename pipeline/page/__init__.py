"""What the report shows: the rows it examines, histograms, galleries, and hostile text made harmless."""
