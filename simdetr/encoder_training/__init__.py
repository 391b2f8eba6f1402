"""The self-supervised encoder on the user's own images.

In reading order:

    crops       images -> batches of random crops, the same for the same (seed, epoch, step)
    objectives  VICReg, VICRegL, DINO: crops of the same images -> one loss
    probe       does the encoder learn, or collapse? what a linear classifier gets right on its features
    fit_encoder images and settings -> weights for mining and their record
"""
