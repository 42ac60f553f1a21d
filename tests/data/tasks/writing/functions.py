"""A function that a task file names."""


def prompt(doc):
    return doc["question"] + " ..."
