"""Figures of the paper: one function each, table or array in, matplotlib Figure out; no files are read or written."""
