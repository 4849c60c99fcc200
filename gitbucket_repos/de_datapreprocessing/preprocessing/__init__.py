"""Raw picture files in, packed shards and a data card out."""
