"""Records the queries, keys and values that attention really receives, document by document."""
