"""One file a person can ship: source, recipe and entropy-coded tensors. docs/pack_format.md describes every byte."""
