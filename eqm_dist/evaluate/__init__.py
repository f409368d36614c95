"""Judging a trained field: images from it, features of images, distances between sets of images, pictures of them.

Nothing here knows of configs, ranks or files: images go in, numbers and pictures come out. A caller with many workers
gives each its own indices and hands in the sum over workers where one is needed.
"""
