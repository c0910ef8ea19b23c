"""Rate-Distortion Retention (RDR): which tokens to keep, and how precisely, per byte."""
