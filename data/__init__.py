"""Where data comes from: the embedded village, whose truth is known, and its file formats."""
