"""What stands in the model directory, and whether it is still what was added."""
