"""The label files of other tools, in and out; what chooses among them is `simdetr.data.label_files`.

In reading order:

    reading         what a reader is given, and what it gathers: shapes of images -> checked labels
    known_images    ids and sizes of the images that a format speaks of
    shapes          polygons, rotated boxes, ellipses and masks -> the boxes around them, and outlines of masks
    xml_tree        XML in, without entities
    json_kinds      which tool a JSON file is of
    yolo            data.yaml and text files, boxes and polygons
    pascal_voc      one XML file per image, and the three ways in which its corners are counted
    label_studio    Label Studio's JSON and JSON-MIN
    cvat            CVAT's XML of images and of videos
    csv_table       one row per box
    conversion      one file to another, with a report of what was changed or lost
"""
