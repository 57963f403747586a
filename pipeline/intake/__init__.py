"""The way in: lists of URLs and pictures on disk as rows in shards of `urls/`, whatever form they come in."""
