"""The mathematics of spherical KV codes: rotation, polar recursion, codebooks, distortion."""
