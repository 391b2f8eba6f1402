"""From few labelled boxes to many: propose, verify, correct."""
