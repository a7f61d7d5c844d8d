"""The product's own encoder: tokens of all texts in one matrix, without padding."""
