"""From a few labelled objects to labels of many images: source, verify, correct."""
