"""Plots: figures as plain data, and one function per kind of panel that draws them."""
