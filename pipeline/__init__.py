"""Headrace's curation half: from a list of URLs, or a folder of pictures, to trainer-ready shards."""
