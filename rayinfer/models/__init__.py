"""transformers as the zoo: loading, paged attention for any architecture, fused blocks for those we know."""
