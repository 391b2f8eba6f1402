"""Labelling with a person in the loop: which images to show, what the person says, and when it is enough.

- image_selection: orders of images, with reasons
- annotator: a simulated person who looks at proposals
- stopping: errors left, with an interval, and rules when to stop
"""
