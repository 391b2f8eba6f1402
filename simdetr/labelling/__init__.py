"""Labelling with a person in the loop: which images to show, what the person says, and when it is enough."""
