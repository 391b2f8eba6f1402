"""The labelling app: a folder of images in, a page on which people label them and train, out.

Its web framework is an extra (``pip install 'simdetr[app]'``) that nothing else of the package imports.
In reading order:

    settings            what the app is started with
    tables              what is kept: projects, images, classes, boxes, runs, events
    database            an address -> a database that is up to date
    box_life            what may become of a box; undo
    refusals            answers other than success
    aside               a process for questions that need torch
    schemas             the shapes of requests and answers
    picture_files       an image's file -> pictures for a browser
    image_list          images added, listed, handed out
    uploads             files that are sent in -> images
    class_list          the classes of a project
    box_edits           what people do with boxes, kept and logged
    snapshots           the labels as they stand -> what trainings and exports read
    proposals           what machines found -> proposals on images
    run_parameters      what runs may be told
    run_files           the folder of a run
    training_log        a training -> lines for the page
    first_proposals     images alone -> boxes of no name yet
    jobs                what a worker does for each kind of run
    worker              the process that does the runs
    detectors_at_hand   the detectors that a project can use
    run_queue           the runs, one at a time
    found_boxes         what detections found, to be looked at
    summaries           a detector -> what it is made of
    progress_made       what people did -> whether to go on
    training_views      how an image may look in training
    pseudo_classes      a pretraining's clusters, named
    label_exchange      labels of other tools, in and out
    desk                what all requests share
    project_routes      requests about projects and classes
    image_routes        requests about images and boxes
    run_routes          requests about runs and detectors
    shot_routes         requests about few labels to many
    label_routes        requests about other tools' labels, clusters, augmentation
    guard               who may ask
    server              all of it together, served
    client              the interface from Python, in a few lines
"""
