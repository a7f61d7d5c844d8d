"""Tests of the image: they start containers, so whoever runs them is whoever may do that, root or not."""
