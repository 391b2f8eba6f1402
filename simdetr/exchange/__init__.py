"""Weights in and out: every format of a detector in one place.

In reading order:

    formats          whose checkpoint it is, and which detector it describes
    parameter_names  names of parameters here, in official checkpoints and in transformers
    weights          detectors on disk: saved, loaded, copied into others
    convert          import and export of whole detectors
    onnx             ONNX export, and whether the file computes the same
"""
