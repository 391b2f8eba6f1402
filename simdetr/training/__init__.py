"""Training: labelled images and a detector in, a trained detector and the labels it gives out.

In reading order:

    datamodule      images and labels of one training
    sampler         batches that depend only on (seed, epoch, step)
    detection_task  one detector learning boxes and classes; validation scores
    optimisation    parameter groups, schedules, the end at convergence
    train           one training to its end, from where it stopped
    run_folder      where a run keeps things, and which of its steps are done
    progress        bars with rate and time left
    training_bar    the bar of a training
    throughput      how fast images go through a trained detector
    detector_encoder  the backbone of a trained detector as the encoder of a mining
    relabel         detections over a set of images: labels of the next stage, predictions
    fusion          what becomes of the labels before and the detections
    inference       predict and evaluate
    auto_batch      the largest batch that fits the device
    recipe_choice   no config -> the recipe that fits machine and images
    run_time        how long a run will take
    arms            what a comparison compares, by name
    label_budgets   how many labels it gives them
    side_by_side    trainings that several processes share
"""
